"""What a file that holds audio is to the rest: its recordings by name, one at a time."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


class Container(Protocol):
    """An open file that holds recordings. Threads may ask at once.

    weight: how much memory it takes, in members of a tar archive.
    """

    weight: int

    def open(self, name: str) -> BinaryIO:
        """One recording.

        Raises:
            KeyError: there is none of this name.
            OSError: the file cannot be read.
        """
        ...


@dataclass(frozen=True)
class ContainerKind:
    """One kind of such a file, known by the end of its name. `opening.KINDS` lists them all.

    load: raises BadSampleError where the file is not of this kind.
    place: of a name inside the file, where names tell it: recordings are best read in the order of their places.
    """

    suffix: str
    load: Callable[[Path], Container]
    place: Callable[[str], int] = lambda name: 0


class FilePart(io.RawIOBase):
    """Some bytes of a file, as a file of their own; wrap it in a BufferedReader."""

    def __init__(self, path: Path, start: int, size: int):
        self._descriptor = os.open(path, os.O_RDONLY)
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, before + offset)
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        wanted = max(0, min(len(buffer), self._size - self._position))
        found = os.pread(self._descriptor, wanted, self._start + self._position)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
