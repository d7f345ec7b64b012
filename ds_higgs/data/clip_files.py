"""One Arrow file of encoded clips: written with checksums, read clip by clip."""

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ds_higgs.data.arrow_files import DamagedFileError, bytes_matrix, read_table
from ds_higgs.data.key_index import KEY_BYTES

# codes: codebook by codebook; content: the hash of the audio file, where it is known.
CLIP_SCHEMA = pa.schema(
    [
        ("key", pa.binary()),
        ("content", pa.string()),
        ("codec", pa.string()),
        ("seconds", pa.float64()),
        ("frames", pa.int32()),
        ("checksum", pa.uint32()),
        ("codes", pa.list_(pa.int16())),
    ]
)


@dataclass(frozen=True)
class EncodedClip:
    """codes: [codebooks, frames]; seconds: length of the decoded audio, before padding to whole frames.

    content: the hash of its audio's bytes, where it is known.
    """

    codes: torch.Tensor
    seconds: float
    content: str | None = None


def clips_to_batch(clips: Mapping[str, EncodedClip], codec_identity: str) -> pa.RecordBatch:
    """Clips by key, as rows of a file."""
    codes = [clip.codes.to(torch.int16).numpy() for clip in clips.values()]
    keys = [bytes.fromhex(key) for key in clips]
    seconds = [clip.seconds for clip in clips.values()]
    rows = zip(keys, seconds, codes, strict=True)
    ends = np.cumsum([0, *(one.size for one in codes)], dtype=np.int32)
    values = np.concatenate([np.zeros(0, np.int16), *(one.reshape(-1) for one in codes)])
    columns = [
        pa.array(keys, pa.binary()),
        pa.array([clip.content for clip in clips.values()], pa.string()),
        pa.array([codec_identity[:16]] * len(clips), pa.string()),
        pa.array(seconds, pa.float64()),
        pa.array([one.shape[1] for one in codes], pa.int32()),
        pa.array([_checksum(key, length, one.shape[1], one.reshape(-1)) for key, length, one in rows], pa.uint32()),
        pa.ListArray.from_arrays(pa.array(ends), pa.array(values)),
    ]
    return pa.record_batch(columns, schema=CLIP_SCHEMA)


class ClipFile:
    """The clips in a file; nothing of them is copied out of the page cache.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        DamagedFileError: it is no whole file of clips.
    """

    def __init__(self, path: Path):
        self.path = path
        table = read_table(path)
        if not table.schema.equals(CLIP_SCHEMA):
            raise DamagedFileError(f"{path}: not a table of clips")
        try:
            self._batches = [_ClipBatch(batch) for batch in table.to_batches() if batch.num_rows]
        except pa.ArrowException as error:
            raise DamagedFileError(f"{path}: not a table of clips: {error}") from None
        self._ends = np.cumsum([len(batch.frames) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def keys(self) -> np.ndarray:
        """[clips, KEY_BYTES] uint8."""
        return np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *(batch.keys for batch in self._batches)])

    @property
    def seconds(self) -> np.ndarray:
        """[clips] float64."""
        return np.concatenate([np.zeros(0), *(batch.seconds for batch in self._batches)])

    @property
    def frames(self) -> np.ndarray:
        """[clips] int32."""
        return np.concatenate([np.zeros(0, np.int32), *(batch.frames for batch in self._batches)])

    def read(self, row: int) -> np.ndarray | None:
        """[codebooks, frames] int16 codes, or None where they are not what was written."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._batches[number].read(row - int(self._ends[number - 1] if number else 0))

    def intact_batches(self) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Batch by batch the clips that are what was written, and the number of those that are not."""
        for batch in self._batches:
            intact = np.fromiter((batch.read(row) is not None for row in range(len(batch.frames))), dtype=np.bool_)
            if intact.all():
                yield batch.rows, 0
            else:
                kept = [batch.rows.slice(int(row), 1) for row in np.flatnonzero(intact)]
                table = pa.Table.from_batches(kept, CLIP_SCHEMA).combine_chunks()
                yield from ((rows, 0) for rows in table.to_batches())
                yield batch.rows.slice(0, 0), int((~intact).sum())


class _ClipBatch:
    """Views of a record batch's columns."""

    def __init__(self, rows: pa.RecordBatch):
        self.rows = rows
        codes = rows.column("codes")
        self.keys = bytes_matrix([rows.column("key")], KEY_BYTES)
        self.seconds, self.frames, self._checksums = (
            rows.column(name).to_numpy() for name in ("seconds", "frames", "checksum")
        )
        self._offsets, self._values = np.asarray(codes.offsets), np.asarray(codes.values)

    def read(self, row: int) -> np.ndarray | None:
        start, stop = self._offsets[row : row + 2].tolist()
        codes, frames = self._values[start:stop], int(self.frames[row])
        if frames <= 0 or not len(codes) or len(codes) % frames:
            return None
        checksum = _checksum(self.keys[row].tobytes(), float(self.seconds[row]), frames, codes)
        return codes.reshape(-1, frames) if checksum == int(self._checksums[row]) else None


def _checksum(key: bytes, seconds: float, frames: int, codes: np.ndarray) -> int:
    return zlib.crc32(codes.tobytes(), zlib.crc32(struct.pack("<16sdi", key, seconds, frames)))
