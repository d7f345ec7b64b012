"""`adapters/best`: written at once or, with `checkpoint.async`, from a copy while the run trains on."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from ds_higgs.adapters.saving import HostWeights, save_from_host, save_trained
from ds_higgs.checkpoint import Background
from ds_higgs.checkpoint.host_copies import HostCopies
from ds_higgs.job import distributed
from ds_higgs.training.save_errors import save_errors


@dataclass(frozen=True, eq=False)
class BestWrite:
    """One that is under way: by rank 0 alone, whose `work` it is; `done` is called where it has come to its end."""

    work: "Future[None] | None"
    done: Callable[[], None]


class BestAdapter:
    """Writes the weights that evaluated best, one write at a time. Every rank makes the same calls.

    Args:
        background: its thread writes after what it was given before; None: everything is written at once.
        tolerate_errors: only tell what cannot be written.
    """

    def __init__(self, engine: DeepSpeedEngine, folder: Path, *, background: Background | None, tolerate_errors: bool):
        self._engine = engine
        self._folder = folder
        self._background = background
        self._tolerate_errors = tolerate_errors
        self._copies = HostCopies()
        self.under_way: BestWrite | None = None

    def write(self, done: Callable[[], None], **arguments: Any) -> None:
        """Replace the folder by the weights as they are in the model now: all of it, or nothing.

        Args:
            done: called once they are there.
            arguments: of `save_trained`.

        Raises:
            OSError: on every rank, where they, or those before, could not be written.
        """
        self.finish()
        if self._background is None:
            with save_errors(tolerate=self._tolerate_errors):
                save_trained(self._engine, self._folder, **arguments)
                done()
            return
        self._copies.begin()
        weights = HostWeights.copied(self._engine, self._copies)
        work = None
        if distributed.is_main_rank():
            model = self._engine.module.peft_model
            work = self._background.submit(partial(save_from_host, model, weights, self._folder, **arguments))
        self.under_way = BestWrite(work, done)

    def finish(self) -> None:
        """Wait for the write under way, if there is one; raises what `write` does."""
        write, self.under_way = self.under_way, None
        if write is not None:
            with save_errors(tolerate=self._tolerate_errors):
                distributed.on_main_rank(lambda: _wait(write))
                write.done()

    def check(self, write: BestWrite | None) -> None:
        """On rank 0, by its thread, before it is said on the disk that `write` was the best: that it has succeeded."""
        if write is not None and not self._tolerate_errors:
            _wait(write)


def _wait(write: BestWrite) -> None:
    assert write.work is not None, "of another rank"
    write.work.result()
