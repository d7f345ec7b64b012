"""A checkpoint that is being written: its files by all ranks, then, once all of them are whole, the commit by rank 0.

Whatever writes may do so in a thread, beside the training: no thread takes part in anything collective. The ranks enter
each phase together, between two steps.
"""

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import ds_higgs.checkpoint.collective as collective
from ds_higgs.checkpoint.folders import publish, retain
from ds_higgs.checkpoint.marker import MARKER_NAME, Marker, encode_marker
from ds_higgs.checkpoint.writing import HashingFile, RecordingWriter, describe_os_error

T = TypeVar("T")


class CheckpointSaveError(OSError):
    """A checkpoint could not be written (full disk, read-only folder); the earlier ones are whole."""


@dataclasses.dataclass(frozen=True)
class Commit:
    """What rank 0 does once all files of a checkpoint are whole: older ones go only after it.

    keep_latest, keep_bytes: see `folders.retain`.
    before: with the folder, not yet of its final name, and the marker; what it raises, an OSError, undoes the save.
    after: once the checkpoint exists.
    """

    keep_latest: int
    keep_bytes: float = math.inf
    before: Callable[[Path, Marker], None] = lambda folder, marker: None
    after: Callable[[], None] = lambda: None

    def make(self, partial: Path, marker: Marker) -> Path:
        """Write the marker, give the checkpoint its name, let older ones go."""
        self.before(partial, marker)
        file = HashingFile(partial / MARKER_NAME)
        file.write(encode_marker(marker))
        file.finish()
        final = publish(partial, marker.step)
        retain(final.parent, newest=final, keep_latest=self.keep_latest, keep_bytes=self.keep_bytes)
        self.after()
        return final


class PendingCheckpoint:
    """A save under way, on every rank.

    Args:
        partial: the folder that the files go to.
        marker: what the checkpoint will say of itself, but for its files.
        writer: has been given this rank's files.
        submit: has work done, now or in a thread.
    """

    def __init__(
        self,
        partial: Path,
        marker: Marker,
        writer: RecordingWriter,
        commit: Commit,
        submit: Callable[[Callable[[], Any]], "Future[Any]"],
    ):
        self.step = marker.step
        self._partial = partial
        self._marker = marker
        self._writer = writer
        self._commit = commit
        self._submit = submit
        self._files_are_whole = False
        self._work = submit(writer.write_queued)

    @property
    def is_ready(self) -> bool:
        """Whether this rank has done its part of the phase that the save is in."""
        return self._work.done()

    def advance(self) -> Path | None:
        """Enter the next phase, after waiting for this one; the checkpoint, once it is complete. Every rank calls it.

        Raises:
            CheckpointSaveError: on every rank, naming the files that could not be written on any of them.
        """
        if self._files_are_whole:
            return on_rank_zero(self._work.result, self._partial.parent)
        self._work.result()
        marker = dataclasses.replace(self._marker, files=self._merged_records())
        self._files_are_whole = True
        if collective.rank() == 0:
            self._work = self._submit(lambda: self._commit.make(self._partial, marker))
        return None

    def finish(self) -> Path:
        """Wait until the checkpoint is complete. Every rank calls it; raises what `advance` does."""
        while (final := self.advance()) is None:
            pass
        return final

    def abandon(self) -> None:
        """Let what is not written yet be, on this rank alone, which fails: the folder goes at the next start."""
        self._writer.abandon()

    def _merged_records(self) -> dict:
        """All ranks' files, once it is known that every rank could write its own."""
        gathered = collective.gather((self._writer.files, self._writer.problems))
        problems = [f"rank {rank}: {problem}" for rank, (_, found) in enumerate(gathered) for problem in found]
        if problems:
            on_rank_zero(lambda: _discard(self._partial), self._partial)
            name = self._partial.name.removeprefix(".partial-")
            raise CheckpointSaveError(f"could not save {name}: " + "; ".join(problems))
        return {name: record for files, _ in gathered for name, record in files.items()}


def at_once(work: Callable[[], T]) -> "Future[T]":
    """Do `work` now: in the place of a thread's `submit`."""
    done: Future[T] = Future()
    try:
        done.set_result(work())
    except Exception as error:  # raised by `result`, as by a thread's
        done.set_exception(error)
    return done


def on_rank_zero(action: Callable[[], T], path: Path) -> T:
    """`collective.on_rank_zero`, with what cannot be written as a CheckpointSaveError."""
    try:
        return collective.on_rank_zero(action)
    except OSError as error:
        raise CheckpointSaveError(f"could not save a checkpoint: {describe_os_error(error, path)}") from error


def _discard(partial: Path) -> None:
    for path in partial.iterdir():
        path.unlink()
    partial.rmdir()
