"""Recordings in a column of a Parquet or Arrow file, as the `datasets` library keeps them: `audio[17]` is row 17."""

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ds_higgs.data.containers.container import ContainerKind
from ds_higgs.data.problems import BadSampleError

CODES_COLUMNS = ("codes", "audio_codes", "audio_tokens")  # of lists of numbers [codebooks, frames]
_NAME = re.compile(r"(.+)\[(\d+)\]")
_BATCH_ROWS = 16  # two such batches are kept: threads may ask for rows a little out of order
_WEIGHT = 500_000  # about 25 MB, of a row group, in members of a tar archive


def row_name(column: str, row: int) -> str:
    """What a row's recording is called inside its file."""
    return f"{column}[{row}]"


def _parse(name: str) -> tuple[str, int]:
    if (found := _NAME.fullmatch(name)) is None:
        raise KeyError(name)
    return found[1], int(found[2])


def _row_of(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[2]) if found else 0


class ParquetContainer:
    """Rows of a Parquet file: one row group at most is in memory, and rows that follow each other are read once."""

    def __init__(self, path: Path):
        try:
            self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        except pa.ArrowInvalid as error:
            raise BadSampleError(f"{path.name} is no Parquet file: {error}") from None
        groups = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *groups])
        self._lock = threading.Lock()
        self._reading: tuple[str, int] | None = None  # the column and row group that are being read
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._kept: list[tuple[int, pa.Array]] = []  # the last batches, each with its first row
        self.weight = _WEIGHT

    def open(self, name: str) -> BinaryIO:
        """See Container."""
        column, row = _parse(name)
        if column not in self._file.schema_arrow.names or row >= self._starts[-1]:
            raise KeyError(name)
        try:
            with self._lock:
                return io.BytesIO(_bytes_of(self._read(column, row), name))
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise BadSampleError(f"row {row} of the Parquet file cannot be read: {error}") from None

    def _read(self, column: str, row: int) -> Any:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if self._reading != (column, group) or (self._kept and row < self._kept[0][0]):
            columns = [column if self._is_plain(column) else f"{column}.bytes"]
            self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
            self._reading, self._kept = (column, group), []
        first = self._kept[-1][0] + len(self._kept[-1][1]) if self._kept else int(self._starts[group])
        while row >= first:
            values = next(self._batches).column(0)
            self._kept = [*self._kept[-1:], (first, values)]
            first += len(values)
        start, values = next((start, values) for start, values in reversed(self._kept) if start <= row)
        return values[row - start].as_py()

    def _is_plain(self, column: str) -> bool:
        return not pa.types.is_struct(self._file.schema_arrow.field(column).type)


class ArrowContainer:
    """Rows of an Arrow stream, mapped into memory: any order is as good."""

    weight = 1

    def __init__(self, path: Path):
        try:
            self._table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except pa.ArrowException as error:
            raise BadSampleError(f"{path.name} is no Arrow stream: {error}") from None

    def open(self, name: str) -> BinaryIO:
        """See Container."""
        column, row = _parse(name)
        if column not in self._table.column_names or row >= len(self._table):
            raise KeyError(name)
        return io.BytesIO(_bytes_of(self._table[column][row].as_py(), name))


def _bytes_of(value: Any, name: str) -> bytes:
    """Of an Audio column's row, or of a column of bytes."""
    if isinstance(value, list):
        return _array_file(value, name)
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise BadSampleError(f"{name} holds no audio")
    return content


def _array_file(value: list, name: str) -> bytes:
    """Lists of numbers as a NumPy file."""
    buffer = io.BytesIO()
    try:
        np.save(buffer, np.asarray(value), allow_pickle=False)
    except ValueError:
        raise BadSampleError(f"{name} holds lists of other lengths") from None
    return buffer.getvalue()


PARQUET = ContainerKind(".parquet", ParquetContainer, _row_of)
ARROW = ContainerKind(".arrow", ArrowContainer)
