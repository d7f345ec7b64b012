"""Audio by its path, whether it is a file of its own or lies in another: `shards/0001.tar::clip.wav`.

A new kind of file is added to KINDS, and nowhere else.
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ds_higgs.data.containers import tables, tar
from ds_higgs.data.containers.container import Container
from ds_higgs.data.problems import BadSampleError

KINDS = {kind.suffix: kind for kind in (tar.KIND, tables.PARQUET, tables.ARROW)}
SEPARATOR = "::"
_MAX_WEIGHT = 2_000_000  # of the files that are held open: about 100 MB


def split_name(path: str | Path) -> tuple[str, str] | None:
    """The file and the name inside it, None where the path names a file of its own."""
    file, separator, inside = os.fspath(path).partition(SEPARATOR)
    return (file, inside) if separator and _suffix(file) in KINDS else None


def name_inside(file: str | Path, name: str) -> Path:
    """The path of what is called `name` inside a file; `split_name` takes it apart."""
    return Path(f"{file}{SEPARATOR}{name}")


def file_on_disk(path: str | Path) -> str:
    """The file that holds the audio: the path's own, or the one around it."""
    named = split_name(path)
    return os.fspath(path) if named is None else named[0]


def open_audio(path: Path) -> BinaryIO:
    """A recording's bytes as a file.

    Raises:
        OSError: it cannot be read.
        BadSampleError: the file around it is damaged, or does not hold it.
    """
    named = split_name(path)
    if named is None:
        return open(path, "rb")
    file, name = named
    try:
        return _containers.get(Path(file)).open(name)
    except KeyError:
        raise BadSampleError(f"there is no {name!r} in {os.path.basename(file)}") from None


def reading_place(path: str) -> tuple[str, int]:
    """Recordings are best read in the order of this: the file around each, or its own, and the place inside."""
    file, name = split_name(path) or (path, None)
    return file, 0 if name is None else KINDS[_suffix(file)].place(name)


def reading_places(paths: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray | None:
    """Where some of the paths are best read: [rows, 2] int64, a number of the file around each, the place inside it.

    None where all are files of their own.
    """
    if not pc.any(pc.match_substring(paths, SEPARATOR)).as_py():
        return None
    files: dict[str, int] = {}
    places = np.zeros((len(rows), 2), dtype=np.int64)
    for row, path in enumerate(paths.take(pa.array(rows)).to_pylist()):
        file, place = reading_place(path) if split_name(path) else ("", 0)
        places[row] = files.setdefault(file, len(files)), place
    return places


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


class _OpenContainers:
    """The files that were asked for last, as many as there is room for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple, Container] = OrderedDict()

    def get(self, path: Path) -> Container:
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
            else:
                self._open[key] = KINDS[_suffix(key[0])].load(path)
                while len(self._open) > 1 and sum(one.weight for one in self._open.values()) > _MAX_WEIGHT:
                    self._open.popitem(last=False)
            return self._open[key]


_containers = _OpenContainers()
