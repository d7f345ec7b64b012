"""The table of samples: what analysis finds of each, as Arrow columns, and rows of it as numpy views of the file."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ds_higgs.data.arrow_files import ListColumn, bytes_matrix, whole_column
from ds_higgs.data.chatml import NO_URL, TokenizedSample
from ds_higgs.data.clips import Clip
from ds_higgs.data.key_index import KEY_BYTES
from ds_higgs.layout import AudioLayout

# path: as the manifest has it, "" where the manifest itself holds the audio; content: hash of the audio's bytes.
CLIP_TYPE = pa.struct(
    [
        ("key", pa.binary()),
        ("content", pa.binary()),
        ("path", pa.string()),
        ("item", pa.int32()),
        ("offset", pa.float64()),
        ("duration", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
# entry: digest of the sample's JSON; learned: spans of tokens that are labels, [start, stop, start, stop, ...];
# served_*: the same sample in the form that servers send, where an epoch mixes two forms.
ANALYSED_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("entry", pa.binary()),
        ("speaker", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.int32())),
        ("served_tokens", pa.list_(pa.int32())),
        ("served_learned", pa.list_(pa.int32())),
        ("clips", pa.list_(CLIP_TYPE)),
    ]
)
# Of a prepared set: lengths in positions, `count_targets`, and a checksum of the lists.
_MEASURES = [("length", pa.int32()), ("served_length", pa.int32()), ("text_targets", pa.int32())]
_MEASURES += [("target_frames", pa.int32()), ("forms_differ", pa.int8()), ("checksum", pa.uint32())]
MEASURES = tuple(name for name, _ in _MEASURES)
SAMPLE_SCHEMA = pa.schema([*ANALYSED_SCHEMA, ("source", pa.string()), *_MEASURES])


@dataclass(frozen=True)
class AnalysedSample:
    """A sample without a problem.

    number: its place in the manifest; start, end: its bytes there; entry: their digest.
    clips: one per placeholder, in order.
    served: the same in the form that servers send, where an epoch mixes the two; it has the same clips.
    """

    number: int
    start: int
    end: int
    entry: bytes
    tokenized: TokenizedSample
    clips: list[Clip]
    speaker: str | None
    served: TokenizedSample | None = None


def samples_to_table(samples: Sequence[AnalysedSample]) -> pa.Table:
    """Rows of ANALYSED_SCHEMA."""
    served = [sample.served or TokenizedSample([], [], []) for sample in samples]
    columns = {
        "number": [sample.number for sample in samples],
        "start": [sample.start for sample in samples],
        "end": [sample.end for sample in samples],
        "entry": [sample.entry for sample in samples],
        "speaker": [sample.speaker for sample in samples],
        "tokens": [sample.tokenized.tokens for sample in samples],
        "learned": [_spans(sample.tokenized.supervised) for sample in samples],
        "served_tokens": [sample.tokens for sample in served],
        "served_learned": [_spans(sample.supervised) for sample in served],
        "clips": [_clip_rows(sample) for sample in samples],
    }
    return pa.table(columns, schema=ANALYSED_SCHEMA)


def _spans(supervised: Sequence[bool]) -> np.ndarray:
    padded = np.concatenate([[False], np.asarray(supervised, dtype=np.bool_), [False]])
    return np.flatnonzero(padded[1:] != padded[:-1]).astype(np.int32)


def _clip_rows(sample: AnalysedSample) -> list[dict]:
    return [
        {
            "key": bytes.fromhex(clip.key),
            "content": bytes.fromhex(clip.content),
            "path": "" if content.audio_url in NO_URL else content.audio_url,
            "item": clip.item,
            "offset": clip.offset,
            "duration": clip.duration,
            "seconds": clip.seconds,
        }
        for clip, content in zip(sample.clips, sample.tokenized.clips, strict=True)
    ]


class SampleTable:
    """Samples by row. All but a few numbers a sample stays in the file.

    Args:
        table: of ANALYSED_SCHEMA or SAMPLE_SCHEMA.
        audio_root: what relative paths are relative to.
    """

    def __init__(self, table: pa.Table, audio_root: Path):
        self.table = table
        self.audio_root = audio_root
        self._lists = {
            name: ListColumn(table[name]) for name in ("tokens", "learned", "served_tokens", "served_learned")
        }
        self._clips = _ClipColumn(table["clips"])

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, one a sample."""
        return whole_column(self.table[name])

    def value(self, name: str, row: int) -> Any:
        """One value of a column."""
        return self.table[name][row].as_py()

    def speaker(self, row: int) -> str | None:
        """Where it is known."""
        return self.value("speaker", row)

    def speakers(self) -> np.ndarray:
        """[samples] int32, equal numbers for equal speakers, -1 where nobody knows."""
        named = self.table["speaker"].combine_chunks().dictionary_encode()
        return named.indices.fill_null(-1).to_numpy()

    def recordings(self) -> np.ndarray:
        """[uses] int64, equal numbers for the same stretch of the same audio."""
        contents = pa.chunked_array(self._clips.arrays("content"), pa.binary()).combine_chunks().dictionary_encode()
        columns = [contents.indices.to_numpy(), self._numbers("offset"), self.seconds()]
        order = np.lexsort(columns[::-1])
        differs = np.zeros(max(0, len(order) - 1), dtype=np.bool_)
        for column in columns:
            differs |= column[order[1:]] != column[order[:-1]]
        recordings = np.zeros(len(order), dtype=np.int64)
        recordings[order[1:]] = np.cumsum(differs)
        return recordings

    def tokens(self, row: int, *, served: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """[num_tokens] int32 tokens, and whether each is a label."""
        tokens = self._lists["served_tokens" if served else "tokens"][row]
        supervised = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in self._lists["served_learned" if served else "learned"][row].reshape(-1, 2).tolist():
            supervised[start:stop] = True
        return tokens, supervised

    def checksum(self, row: int) -> int:
        """Of the sample's lists, and of nothing else."""
        found = zlib.crc32(self._clips.keys_of(row).tobytes())
        for column in self._lists.values():
            found = zlib.crc32(column[row].tobytes(), found)
        return found

    def clips(self, row: int) -> list[Clip]:
        """One per placeholder, in order."""
        return [self._clip(use, row) for use in range(self.first_use(row), self.first_use(row + 1))]

    def clip(self, use: int) -> Clip:
        """A clip by its number among the clips of all samples."""
        return self._clip(use, self.row_of_use(use))

    def first_use(self, row: int) -> int:
        """Clips of all samples before this one."""
        return self._clips.first_use(row)

    def row_of_use(self, use: int) -> int:
        """The sample that has the clip."""
        return int(np.searchsorted(self.clip_ends, use, side="right"))

    @cached_property
    def clip_ends(self) -> np.ndarray:
        """[samples] int64, clips of all samples up to and with this one."""
        return np.cumsum(self._clips.counts())

    def keys(self) -> np.ndarray:
        """[uses, KEY_BYTES] uint8, of the clips of all samples."""
        return np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *self._clips.keys()])

    def seconds(self) -> np.ndarray:
        """[uses] float64."""
        return self._numbers("seconds")

    def paths(self) -> pa.ChunkedArray:
        """[uses] strings, of the clips' files as the manifest has them."""
        return pa.chunked_array(self._clips.arrays("path"), pa.string())

    def audio_targets(self, row: int, layout: AudioLayout) -> np.ndarray:
        """For each clip of a sample whether it is learned: [num_clips] bool."""
        return layout.audio_targets(*self.tokens(row))

    def _numbers(self, name: str) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(one.to_numpy() for one in self._clips.arrays(name))])

    def _clip(self, use: int, row: int) -> Clip:
        found = self._clips[use]
        path = found["path"] and str(self.audio_root / found["path"])
        start, end = (0, 0) if path else (self.value(name, row) for name in ("start", "end"))
        return Clip(
            key=found["key"].hex(),
            path=path,
            start=start,
            end=end,
            item=found["item"],
            offset=found["offset"],
            duration=found["duration"],
            seconds=found["seconds"],
            content=found["content"].hex(),
        )


class _ClipColumn:
    """The column `clips`: structs by their number among those of all rows."""

    def __init__(self, column: pa.ChunkedArray):
        self._chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._values = [chunk.flatten() for chunk in self._chunks]  # without the copies' other rows
        self._ends = np.cumsum([len(values) for values in self._values], dtype=np.int64)
        self._row_ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)
        self._keys = [bytes_matrix([values.field("key")], KEY_BYTES) for values in self._values]
        self._offsets = [np.asarray(chunk.offsets) for chunk in self._chunks]

    def __getitem__(self, use: int) -> dict:
        chunk = int(np.searchsorted(self._ends, use, side="right"))
        return self._values[chunk][use - (int(self._ends[chunk - 1]) if chunk else 0)].as_py()

    def keys(self) -> list[np.ndarray]:
        return self._keys

    def first_use(self, row: int) -> int:
        """Structs in all rows before this one."""
        if not self._chunks:
            return 0
        chunk = min(int(np.searchsorted(self._row_ends, row, side="right")), len(self._chunks) - 1)
        offsets = self._offsets[chunk]
        place = row - (int(self._row_ends[chunk - 1]) if chunk else 0)
        return int(offsets[place] - offsets[0]) + (int(self._ends[chunk - 1]) if chunk else 0)

    def keys_of(self, row: int) -> np.ndarray:
        """[clips of a row, KEY_BYTES]."""
        first, stop = self.first_use(row), self.first_use(row + 1)
        chunk = int(np.searchsorted(self._row_ends, row, side="right"))
        before = int(self._ends[chunk - 1]) if chunk else 0
        return self._keys[chunk][first - before : stop - before]

    def counts(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for offsets in self._offsets)])

    def arrays(self, name: str) -> list[pa.Array]:
        return [values.field(name) for values in self._values]
