"""Files that are hashed while they are written, synced to the disk, and whose write errors wait to be asked for."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch.serialization import get_crc32_options, set_crc32_options

from ds_higgs.checkpoint.marker import FileRecord

_SYNC_BYTES = 64 << 20


class HashingFile:
    """A write-only binary file that hashes what goes through it.

    Large pieces are hashed by a thread while they are written, and another one brings what is written to the disk
    meanwhile: a save is to take as long as the slowest of the three, not their sum.

    torch.save's C++ writer aborts half-way when a write raises, so a failed write is kept in `error` and what
    follows is dropped.
    """

    def __init__(self, path: Path):
        self.error: OSError | None = None
        self._digest = hashlib.sha256()
        self._size = 0
        self._unsynced = 0
        self._file = path.open("wb", buffering=0)
        self._hasher = ThreadPoolExecutor(1)
        self._syncer = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        hashing = self._hasher.submit(self._digest.update, view)
        if self.error is None:
            try:
                self._write_all(view)
            except OSError as error:
                self.error = error
        hashing.result()  # before the caller takes its memory back
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: `finish` brings everything to the disk."""

    def finish(self) -> FileRecord:
        """Bring the file to the disk and close it.

        Raises:
            OSError: the first error of any write or sync, or of the closing.
        """
        try:
            if self._syncing is not None:
                self._syncing.result()
            if self.error is not None:
                raise self.error
            os.fsync(self._file.fileno())
        finally:
            self._hasher.shutdown()
            self._syncer.shutdown()
            self._file.close()
        return FileRecord(self._size, self._digest.hexdigest())

    def _write_all(self, view: memoryview) -> None:
        while view:
            written = self._file.write(view[:_SYNC_BYTES])
            view = view[written:]
            self._unsynced += written
            if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
                self._sync_meanwhile()

    def _sync_meanwhile(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
        self._syncing = self._syncer.submit(os.fdatasync, self._file.fileno())
        self._unsynced = 0


class RecordingWriter(TorchCheckpointEngine):
    """Takes the place of DeepSpeed's checkpoint writer for one save.

    DeepSpeed's save has barriers: a rank that raised between them would leave the others waiting. So a write that
    fails is kept in `problems`, and the ranks compare them once DeepSpeed is through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, FileRecord] = {}
        self.problems: list[str] = []
        self._open: HashingFile | None = None

    def save(self, state_dict: dict, path: str) -> None:
        try:
            file = self._open = HashingFile(Path(path))
            with _without_checksums_in_the_archive():
                torch.save(state_dict, file)  # type: ignore[arg-type]
            self.files[Path(path).name] = file.finish()
        except OSError as error:
            self.problems.append(describe_os_error(error, Path(path)))

    def save_bytes(self, data: bytes, path: Path) -> None:
        """Write a file of our own beside DeepSpeed's."""
        try:
            file = self._open = HashingFile(path)
            file.write(data)
            self.files[path.name] = file.finish()
        except OSError as error:
            self.problems.append(describe_os_error(error, path))

    def write_queued(self) -> None:
        """Nothing is: a file is written as it comes."""

    def abandon(self) -> None:
        """Called from another thread: drop what the file that is open has not written yet."""
        if self._open is not None:
            self._open.error = OSError("the save was abandoned")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is there before DeepSpeed is asked to save."""
        assert exist_ok, path


@contextmanager
def _without_checksums_in_the_archive() -> Iterator[None]:
    """torch.save's own CRC-32 would guard the same bytes as the SHA-256 that is taken of them anyway."""
    usual = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(usual)


def describe_os_error(error: OSError, path: Path) -> str:
    return f"{error.filename or path}: {error.strerror or error}"
