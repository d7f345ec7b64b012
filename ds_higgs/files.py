"""Files and folders that appear whole or not at all, JSON that a user may have damaged, locks, and content hashes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ds_higgs.errors import UserError

logger = logging.getLogger(__name__)

SUPERSEDED_FOLDER = "superseded"  # what belongs to a future that a run went back from, or to an earlier run
_PARTIAL_PREFIX = ".partial-"
_REPLACED_PREFIX = ".replaced-"
_READ_BYTES = 1 << 20
# Of a lock, where the file system has none.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
# Of an fsync of a folder, on file systems that promise nothing about the order of names (some network and user ones).
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path` and rename it: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:  # not `tempfile`, whose files nobody else may read
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append_whole(path: Path, content: bytes) -> None:
    """Append `content` to a file; where it cannot all be written, none of it is."""
    with naming(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors say which file they are about: those of a full disk, which come from a write, do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as people read JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: for a file that is missing, cannot be read, or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_text_lines(path: Path, key: str = "") -> list[str]:
    """The lines of a text that a user wrote, without their ends.

    Args:
        key: of the configuration, that named the file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    place = f"{key}: {path}" if key else str(path)
    try:
        return [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise UserError(f"{place}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}") from None


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; other lines are skipped with a warning. No file has no lines.

    Only "\\n" ends a line: U+2028 may stand in a path. What follows the last one was cut off by a kill.
    """
    *lines, _ = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError too
            values = None
        if isinstance(values, dict):
            yield values
        else:
            logger.warning("%s:%d: skipped: expected a JSON object", file, number)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writers that were killed; nobody takes an hour to write one."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process deletes it too, or it is not ours to delete
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


@contextmanager
def replaced_whole(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end, or goes away where an exception is raised."""
    partial = begin_folder(folder)
    try:
        yield partial
        publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def begin_folder(folder: Path) -> Path:
    """An empty folder to write what shall become `folder`, beside it, after mending what a killed writer left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mend_folder(folder)
    partial = folder.with_name(_PARTIAL_PREFIX + folder.name)
    partial.mkdir()
    return partial


def publish_folder(partial: Path, folder: Path) -> None:
    """Give `partial`, once all of it is on the disk, the name `folder`; one that has it goes after that.

    A kill between the two renames leaves the old one beside it, whole: `mend_folder` gives it its name again.
    """
    settle_folder(partial)
    replaced = folder.with_name(_REPLACED_PREFIX + folder.name)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync_folder(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def mend_folder(folder: Path) -> None:
    """Finish or undo what a killed writer of `folder` began."""
    replaced = folder.with_name(_REPLACED_PREFIX + folder.name)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for leftover in (replaced, folder.with_name(_PARTIAL_PREFIX + folder.name)):
        if leftover.exists():
            shutil.rmtree(leftover)


def mend_folders(parent: Path) -> None:
    """Finish or undo what killed writers of any folder in `parent` began."""
    for prefix in (_REPLACED_PREFIX, _PARTIAL_PREFIX):
        for leftover in parent.glob(f"{prefix}*"):
            mend_folder(parent / leftover.name.removeprefix(prefix))


def settle_folder(folder: Path) -> None:
    """Bring all files to the disk, and let those read them who may read the folder.

    safetensors writes files that nobody but their owner may read.
    """
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            found = path.stat().st_mode
            if found | mode != found:
                path.chmod(found | mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def set_aside(path: Path) -> None:
    """Move a folder to `superseded/` beside it, under a name that nothing there has."""
    shelf = path.parent / SUPERSEDED_FOLDER
    shelf.mkdir(exist_ok=True)
    number = 1
    while (target := shelf / f"{path.name}-{number}").exists():
        number += 1
    path.rename(target)
    logger.warning("moved %s to %s: the run went another way", path, target)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (names made, renamed, removed) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


class NumberLocks:
    """Locks by number on one file, which the operating system frees when the process ends, however it ends.

    Where the file cannot be opened for writing, or its file system has no locks, every number can be had: they keep
    processes from doing the same work twice, and nothing may rely on more. So it is without a file (None).
    """

    def __init__(self, path: Path | None):
        self._file: TextIO | None = None
        with contextlib.suppress(OSError):
            self._file = None if path is None else open(path, "a")  # noqa: SIM115 - closing it would free the locks

    @contextmanager
    def hold(self, number: int) -> Iterator[bool]:
        """Hold lock `number`, 0 to 2^62; yields False where another process has it: nobody waits here.

        A process that waits inside the operating system cannot be asked to stop.
        """
        if self._file is None:
            yield True
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, *NO_LOCKS):
                raise
            yield error.errno in NO_LOCKS  # else held by another process
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hash_stream(file)


def hash_stream(file: BinaryIO) -> str:
    """SHA-256 of what is left to read of an open file, in hex."""
    digest = hashlib.sha256()
    while block := file.read(_READ_BYTES):
        digest.update(block)
    return digest.hexdigest()
