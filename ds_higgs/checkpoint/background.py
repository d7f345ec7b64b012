"""Saves that the training does not wait for: what they write is copied first, and a thread brings it to the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from ds_higgs.checkpoint.host_copies import HostCopies
from ds_higgs.checkpoint.writing import RecordingWriter

T = TypeVar("T")


class Background:
    """A rank's thread that writes, and the memory that it writes from: one save at a time."""

    def __init__(self) -> None:
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def writer(self) -> "DeferringWriter":
        """For the next save, once the one before is through."""
        self._copies.begin()
        return DeferringWriter(self._copies)

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Have the thread do `work`."""
        return self._thread.submit(work)


class DeferringWriter(RecordingWriter):
    """Copies what it is given, and writes when `write_queued` is called."""

    def __init__(self, copies: HostCopies) -> None:
        super().__init__()
        self._copies = copies
        self._queue: list[Callable[[], None]] = []

    def save(self, state_dict: dict, path: str) -> None:
        self._queue.append(partial(super().save, self._copies.copy(state_dict), path))

    def save_bytes(self, data: bytes, path: Path) -> None:
        self._queue.append(partial(super().save_bytes, data, path))

    def write_queued(self) -> None:
        while self._queue:
            self._queue.pop(0)()

    def abandon(self) -> None:
        self._queue.clear()
        super().abandon()
