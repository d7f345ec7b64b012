"""Files that are hashed while they are written, synced to the disk, and whose write errors wait to be asked for."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from ds_higgs.checkpoint.marker import FileRecord


class HashingFile:
    """A write-only binary file that hashes what goes through it.

    torch.save's C++ writer aborts half-way when a write raises, so a failed write is kept in `error` and what
    follows is dropped.
    """

    def __init__(self, path: Path):
        self.error: OSError | None = None
        self._digest = hashlib.sha256()
        self._size = 0
        self._file = path.open("wb", buffering=1 << 20)

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                self._file.write(view)
            except OSError as error:
                self.error = error
        self._digest.update(view)
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: `finish` brings everything to the disk."""

    def finish(self) -> FileRecord:
        """Bring the file to the disk and close it.

        Raises:
            OSError: the first error of any write, of the sync or of the closing.
        """
        try:
            if self.error is not None:
                raise self.error
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._close()
        return FileRecord(self._size, self._digest.hexdigest())

    def _close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # closing flushes again; the first error is the one to report
            if self.error is None:
                raise error


class RecordingWriter(TorchCheckpointEngine):
    """Takes the place of DeepSpeed's checkpoint writer for one save.

    DeepSpeed's save has barriers: a rank that raised between them would leave the others waiting. So a write that
    fails is kept in `problems`, and the ranks compare them once DeepSpeed is through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, FileRecord] = {}
        self.problems: list[str] = []

    def save(self, state_dict: dict, path: str) -> None:
        try:
            file = HashingFile(Path(path))
            torch.save(state_dict, file)  # type: ignore[arg-type]
            self.files[Path(path).name] = file.finish()
        except OSError as error:
            self.problems.append(describe_os_error(error, Path(path)))

    def save_bytes(self, data: bytes, path: Path) -> None:
        """Write a file of our own beside DeepSpeed's."""
        try:
            file = HashingFile(path)
            file.write(data)
            self.files[path.name] = file.finish()
        except OSError as error:
            self.problems.append(describe_os_error(error, path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is there before DeepSpeed is asked to save."""
        assert exist_ok, path


@contextmanager
def recorded_writes(engine) -> Iterator[RecordingWriter]:
    """Let a DeepSpeed engine write through a RecordingWriter, and leave its recovery scripts out of the folder."""
    writer, usual_writer = RecordingWriter(), engine.checkpoint_engine
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda save_path: None  # `python -m deepspeed.utils.zero_to_fp32` does the same
    try:
        yield writer
    finally:
        engine.checkpoint_engine = usual_writer
        del engine._copy_recovery_script


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file by a rename, so that a reader sees the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    file = HashingFile(partial)
    file.write(data)
    file.finish()
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (names made, renamed, removed) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_os_error(error: OSError, path: Path) -> str:
    return f"{error.filename or path}: {error.strerror or error}"
