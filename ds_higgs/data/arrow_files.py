"""Arrow files: written whole in pieces of bounded size, read through memory maps, in folders that `datasets` reads."""

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from ds_higgs.files import naming, sync_folder, write_atomically

MAX_FILE_BYTES = 256 << 20
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_SUSPECT = ".suspect"


class DamagedFileError(ValueError):
    """An Arrow file is not what was written."""


class TableWriter:
    """Writes record batches to files of about MAX_FILE_BYTES, each of which appears under its name when it is whole.

    names: of the files written so far.

    Args:
        name: gives the name of file number 0, 1, ...
    """

    def __init__(self, folder: Path, schema: pa.Schema, name: Callable[[int], str]):
        self.names: list[str] = []
        self._folder = folder
        self._schema = schema
        self._name = name
        self._temporary = folder / f".{uuid.uuid4().hex[:12]}.tmp"
        self._file: pa.OSFile | None = None
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._file is not None:
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, batch: pa.RecordBatch) -> None:
        """Raises OSError, naming the file, where it cannot be written."""
        with naming(self._temporary):
            if self._stream is None:
                self._file = pa.OSFile(str(self._temporary), "wb")
                self._stream = pa.ipc.new_stream(self._file, self._schema)
            self._stream.write_batch(batch)
            assert self._file is not None
            if self._file.tell() >= MAX_FILE_BYTES:
                self._finish()

    def _finish(self) -> None:
        if self._stream is None or self._file is None:
            return
        with naming(self._temporary):
            self._stream.close()
            self._file.close()
        self._stream = self._file = None
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        name = self._name(len(self.names))
        os.replace(self._temporary, self._folder / name)
        sync_folder(self._folder)
        self.names.append(name)


def write_table(path: Path, table: pa.Table) -> None:
    """Write one small table to one file, whole or not at all."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    write_atomically(path, sink.getvalue())


def read_table(path: Path) -> pa.Table:
    """The table in a file, whose bytes stay in the page cache that all processes share.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it is no whole Arrow file.
    """
    try:
        with open(path, "rb") as file:
            file.seek(-min(len(_END_OF_STREAM), path.stat().st_size), os.SEEK_END)
            if file.read() != _END_OF_STREAM:
                raise DamagedFileError(f"{path}: cut off")
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        table.validate()
        return table
    except (pa.ArrowException, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system: it may be whole
            raise
        raise DamagedFileError(f"{path}: not a whole Arrow file: {error}") from None


def describe_for_datasets(folder: Path, names: Sequence[str]) -> None:
    """Write what `datasets.load_from_disk` asks of a folder with these files."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": uuid.uuid4().hex[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_atomically(folder / "state.json", json.dumps(state, indent=2).encode())
    write_atomically(folder / "dataset_info.json", b"{}")


def suspect(path: Path) -> bool:
    """Write down that a file was found damaged, for the next preparation; False where that cannot be written."""
    try:
        path.with_name(path.name + _SUSPECT).touch()
    except OSError:
        return False
    return True


def is_suspect(path: Path) -> bool:
    """Whether `suspect` was called for it, by any process."""
    return path.with_name(path.name + _SUSPECT).exists()


def remove_file(path: Path) -> None:
    """Delete a file and what was written down about it; nothing where it is another user's, or gone."""
    for name in (path.name, path.name + _SUSPECT):
        with contextlib.suppress(OSError):
            path.with_name(name).unlink()


def coalesced(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at least `rows`, but for the last; empty ones are left out."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if count >= rows:
            yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()
            waiting, count = [], 0
    if count:
        yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()


class ListColumn:
    """A column of lists of numbers: row i as a view of the file."""

    def __init__(self, column: pa.ChunkedArray, child: str | None = None):
        """child: of the structs in the lists."""
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._ends: np.ndarray = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        self._offsets = [np.asarray(chunk.offsets) for chunk in chunks]
        self._values = [np.asarray(chunk.values if child is None else chunk.values.field(child)) for chunk in chunks]

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        place = row - (int(self._ends[chunk - 1]) if chunk else 0)
        start, stop = self._offsets[chunk][place : place + 2].tolist()
        return self._values[chunk][start:stop]

    def counts(self) -> np.ndarray:
        """[rows] int64, numbers in each list."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for offsets in self._offsets)])

    def flat(self) -> np.ndarray:
        """All numbers of all lists, in order."""
        spans = zip(self._offsets, self._values, strict=True)
        parts = [values[offsets[0] : offsets[-1]] for offsets, values in spans]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])


def whole_column(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as one array: of one chunk a view of the file, else a copy."""
    return column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()


def bytes_matrix(column: pa.ChunkedArray | Iterable[pa.Array], width: int) -> np.ndarray:
    """[rows, width] uint8 of a column of byte strings of one width; of one chunk a view of the file.

    Raises:
        DamagedFileError: some have another width.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else list(column)
    parts = [_matrix_of(chunk, width) for chunk in chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros((0, width), np.uint8), *parts])


def _matrix_of(chunk: pa.Array, width: int) -> np.ndarray:
    _, offsets, data = chunk.buffers()
    if not len(chunk):
        return np.zeros((0, width), np.uint8)
    ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    if (np.diff(ends) != width).any() or data is None or ends[0] < 0 or ends[-1] > data.size:
        raise DamagedFileError(f"keys of other than {width} bytes")
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].reshape(-1, width)
