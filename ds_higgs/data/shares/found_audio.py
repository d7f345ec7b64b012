"""The table of a share's audio items: where each lies, its key and length, or why it cannot be used."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from boson_multimodal.data_types import AudioContent

from ds_higgs.data.arrow_files import TableWriter, bytes_matrix, read_table, whole_column
from ds_higgs.data.clips import AUDIO_FILE_SCHEMA, Clip, ClipFinder, audio_name, raw_audio_items
from ds_higgs.data.containers.opening import reading_places
from ds_higgs.data.distinct_clips import number_distinct
from ds_higgs.data.key_index import KEY_BYTES
from ds_higgs.data.manifest import problem_at, read_entry
from ds_higgs.data.problems import BadSampleError, Problem
from ds_higgs.data.shares.dealing import AudioItem

_BATCH = 4096  # items that are in memory at a time

# path: as the manifest has it, "" where the manifest itself holds the audio; key: none where `error` says why.
FOUND_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("number", pa.int64()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("item", pa.int32()),
        ("offset", pa.float64()),
        ("duration", pa.float64()),
        ("key", pa.binary()),
        ("seconds", pa.float64()),
        ("content", pa.string()),
        ("error", pa.string()),
        ("expected", pa.string()),
    ]
)


def write_found(
    folder: Path, manifest: Path, items: Iterable[AudioItem], finder: ClipFinder, between: Callable[[], None]
) -> list[str]:
    """Look at every item and write what is found; the names of the files.

    Args:
        between: called after each batch.
    """
    found = TableWriter(folder, FOUND_SCHEMA, lambda number: f"found-{number:05d}.arrow")
    files = TableWriter(folder, AUDIO_FILE_SCHEMA, lambda number: f"files-{number:05d}.arrow")
    waiting = iter(items)
    with found, files:
        found.write(_rows([]))
        files.write(finder.take_files())
        while batch := list(islice(waiting, _BATCH)):
            found.write(_rows([_look_at(item, manifest, finder) for item in batch]))
            files.write(finder.take_files())
            between()
    return [*found.names, *files.names]


def _look_at(item: AudioItem, manifest: Path, finder: ClipFinder) -> dict:
    row = dict(vars(item))
    try:
        content = AudioContent(audio_url=item.path, offset=item.offset, duration=item.duration)
        if not item.path:
            content.raw_audio = raw_audio_items(read_entry(manifest, item.start, item.end))[item.item]
        clip = finder.look_at(content, start=item.start, end=item.end, item=item.item)
    except BadSampleError as error:
        return row | {"error": error.message, "expected": error.expected}
    return row | {"key": bytes.fromhex(clip.key), "seconds": clip.seconds, "content": clip.content}


def _rows(rows: list[dict]) -> pa.RecordBatch:
    columns = [[row.get(name) for row in rows] for name in FOUND_SCHEMA.names]
    return pa.record_batch(
        [pa.array(column, kind) for column, kind in zip(columns, FOUND_SCHEMA.types, strict=True)], schema=FOUND_SCHEMA
    )


class FoundAudio:
    """A share's audio items; of those that can be used the distinct clips, by number.

    keys: [clips, KEY_BYTES] uint8; seconds: [clips].

    Args:
        names: of the files that `write_found` has written to the folder.
        audio_root: what relative paths are relative to.
    """

    def __init__(self, folder: Path, names: Iterable[str], audio_root: Path):
        names = list(names)
        tables = {kind: [read_table(folder / name) for name in names if name.startswith(kind)] for kind in _KINDS}
        self.items = pa.concat_tables([FOUND_SCHEMA.empty_table(), *tables["found"]])
        self.files = pa.concat_tables([AUDIO_FILE_SCHEMA.empty_table(), *tables["files"]])
        self._audio_root = audio_root
        usable = np.flatnonzero(self.items["key"].is_valid().to_numpy(zero_copy_only=False))
        keys = bytes_matrix(self.items["key"].drop_null(), KEY_BYTES)
        _, first = number_distinct(keys)
        self._rows, self.keys = usable[first], keys[first]
        self.seconds = whole_column(self.items["seconds"])[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Clip:
        row = self._row(int(self._rows[number]))
        return Clip(
            key=row["key"].hex(),
            path=row["path"] and str(self._audio_root / row["path"]),
            **{name: row[name] for name in ("start", "end", "item", "offset", "duration", "seconds", "content")},
        )

    def reading_places(self) -> np.ndarray | None:
        """See `containers.opening`."""
        return reading_places(self.items["path"], self._rows)

    def unusable(self, failures: dict[str, BadSampleError]) -> Iterator[tuple[dict, BadSampleError]]:
        """The items that cannot be used, as rows.

        Args:
            failures: by key, what was found of clips when they were decoded.
        """
        failed = pa.array([bytes.fromhex(key) for key in failures], pa.binary())
        of_failed = pc.is_in(self.items["key"], value_set=failed)
        of_either = pc.or_(self.items["error"].is_valid(), of_failed)
        for number in np.flatnonzero(of_either.to_numpy()).tolist():
            row = self._row(number)
            key = row["key"]
            yield row, failures[key.hex()] if key is not None else BadSampleError(row["error"], row["expected"])

    def problems(self, manifest: Path, failures: dict[str, BadSampleError]) -> list[Problem]:
        """Of the samples that have the items first."""
        found = ((row, error.of(audio_name(row["path"], row["item"]))) for row, error in self.unusable(failures))
        return [problem_at(manifest, row["number"], error.message, error.expected) for row, error in found]

    def _row(self, number: int) -> dict:
        return {name: self.items[name][number].as_py() for name in FOUND_SCHEMA.names}


_KINDS = ("found", "files")
