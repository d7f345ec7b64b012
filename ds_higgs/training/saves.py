"""What a run goes on from and what it hands out, written at once or, with `checkpoint.async`, while it trains on."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from ds_higgs.adapters.record import AdapterRecord
from ds_higgs.adapters.saving import HostWeights, save_from_host, save_trained
from ds_higgs.checkpoint import Background, Commit, PendingCheckpoint, begin_checkpoint, capture_random_state
from ds_higgs.checkpoint.marker import Marker
from ds_higgs.checkpoint.weights import CheckpointWeights
from ds_higgs.config import Config
from ds_higgs.config.file import fixed_values, resolved
from ds_higgs.job.logs import logger
from ds_higgs.run_folder import AVERAGED, BEST, RunFolder, step_name
from ds_higgs.training.average import Average
from ds_higgs.training.best_adapter import BestAdapter, BestWrite
from ds_higgs.training.metrics import MetricsFile
from ds_higgs.training.position import Position


class Saves:
    """The checkpoints and adapters of a run, one save at a time. Every rank makes the same calls.

    Args:
        average: adapters of steps have one of it inside.
    """

    def __init__(
        self,
        config: Config,
        engine: DeepSpeedEngine,
        *,
        folder: RunFolder,
        metrics: MetricsFile,
        average: Average | None = None,
    ):
        self.config = config
        self.engine = engine
        self.folder = folder
        self.metrics = metrics
        self._average = average
        self._resolved = resolved(config)
        self._background = Background() if config.checkpoint.async_ else None
        self._pending: PendingCheckpoint | None = None
        self._may_fail = False
        self._best = BestAdapter(
            engine,
            folder.adapters / BEST,
            background=self._background,
            tolerate_errors=config.checkpoint.on_save_error == "warn",
        )
        self._best_before: BestWrite | None = None  # the save under way

    def save(
        self, position: Position, states: Mapping[str, Any], *, also: tuple[str, ...] = (), may_fail: bool
    ) -> None:
        """Write the adapter as it is now, then a checkpoint to resume from: whatever it is of is then complete.

        With `checkpoint.async` this returns once both are copied; `go_on` or `finish` completes them.

        Args:
            states: of what goes on, by name; JSON-able.
            also: names that the adapter gets beside that of the step.

        Raises:
            OSError: they could not be written and `may_fail` is false; on every rank, naming the file.
        """
        self._finish_checkpoint()
        self._may_fail = may_fail
        names = (step_name(position.step), *also)
        with self._errors(position.step):
            if self._background is None:
                for name in names:
                    self._hand_out(name, position)
                    self._hand_out_average(name, position)
            self._pending = self._begin(position, states, names)
        if self._background is None:
            self._finish_checkpoint()

    def hand_out_best(self, position: Position, done: Callable[[], None]) -> None:
        """Write the trained weights, as they are in the model now, to adapters/best; see `BestAdapter.write`.

        A checkpoint, which says what was the best, is not complete before them.
        """
        self._best.write(done, record=self._record(position), **self._origin())

    def _hand_out(self, name: str, position: Position) -> None:
        """Write the trained weights, as they are in the model now, to adapters/NAME, or raise on every rank."""
        save_trained(self.engine, self.folder.adapters / name, record=self._record(position), **self._origin())

    def _hand_out_average(self, name: str, position: Position) -> None:
        if self._average is not None:
            with self._average.in_place(also_after=OSError):
                self._hand_out(f"{name}/{AVERAGED}", position)

    @property
    def is_ready(self) -> bool:
        """Whether this rank waits for the others with the save under way."""
        return self._pending is not None and self._pending.is_ready

    def go_on(self) -> None:
        """Take the save under way, for which all ranks are ready, one phase further."""
        assert self._pending is not None
        with self._errors(self._pending.step):
            self._note(self._pending.step, self._pending.advance())

    def finish(self) -> None:
        """Wait for all that is under way."""
        self._finish_checkpoint()
        self._best.finish()

    def _finish_checkpoint(self) -> None:
        if self._pending is not None:
            with self._errors(self._pending.step):
                self._note(self._pending.step, self._pending.finish())

    def abandon(self) -> None:
        """This rank fails: let the save under way be."""
        if self._pending is not None:
            self._pending.abandon()

    def _begin(self, position: Position, states: Mapping[str, Any], names: tuple[str, ...]) -> PendingCheckpoint:
        record = self._record(position)
        best = self._best_before = self._best.under_way

        def hand_out(weights: CheckpointWeights, folder: Path) -> None:
            trained = HostWeights.in_files(weights)
            save_from_host(self.engine.module.peft_model, trained, folder, record=record, **self._origin())

        def hand_out_from_files(files: Path, marker: Marker) -> None:
            self._best.check(best)
            for name in names:
                hand_out(CheckpointWeights(files, marker), self.folder.adapters / name)
                if self._average is not None:
                    hand_out(CheckpointWeights(files, marker, averaged=True), self.folder.adapters / name / AVERAGED)

        checkpoint = self.config.checkpoint
        commit = Commit(
            checkpoint.keep_latest,
            keep_bytes=math.inf if checkpoint.keep_gb is None else checkpoint.keep_gb * 1e9,
            after=lambda: self.folder.prune_adapters(keep=self.config.kept_adapters),
            **({} if self._background is None else {"before": hand_out_from_files}),
        )
        return begin_checkpoint(
            self.engine,
            self.folder.path,
            step=position.step,
            state={"position": vars(position), **states, "config": self._resolved},
            rank_state=capture_random_state(),
            commit=commit,
            fixed=fixed_values(self.config),
            validation_loss=position.validation_loss,
            background=self._background,
        )

    def _record(self, position: Position) -> AdapterRecord:
        return AdapterRecord.of(vars(position), self._resolved, where="the run")

    def _origin(self) -> dict[str, Any]:
        """What is trained, and of which base."""
        model = self.config.model
        return {"mode": self.config.train.mode, "base": self._resolved["model"]["base"], "revision": model.revision}

    def _note(self, step: int, complete: Path | None) -> None:
        if complete is not None:
            self._pending = None
            self.metrics.write("checkpoint", step=step, folder=str(complete.relative_to(self.folder.path)))
            if self._best.under_way is self._best_before:  # written by now
                self._best.finish()

    @contextmanager
    def _errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._pending = None
            if not self._may_fail:
                raise
            logger.warning("%s; going on without it", error)
            self.metrics.write("save_error", step=step, message=str(error))
