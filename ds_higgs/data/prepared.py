"""A prepared set: a manifest's samples, checked and tokenized, where their codes lie, and what all that depends on.

FOLDER/samples   the table of samples, a folder of `datasets`
FOLDER/places.arrow   for each clip of each sample the file of the code cache, its row there, its frames
FOLDER/files.arrow   the audio files that were read, as they were
FOLDER/prepared.json   written last: identity, sizes and checksums, problems
"""

import json
import logging
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from ds_higgs.data.arrow_files import (
    DamagedFileError,
    TableWriter,
    coalesced,
    describe_for_datasets,
    is_suspect,
    read_table,
    suspect,
    whole_column,
    write_table,
)
from ds_higgs.data.cache import ClipPlaces
from ds_higgs.data.identity import Identity
from ds_higgs.data.measures import with_measures
from ds_higgs.data.problems import Problem
from ds_higgs.data.sample_table import MEASURES, SAMPLE_SCHEMA, SampleTable
from ds_higgs.errors import UserError
from ds_higgs.files import settle_folder, sync_folder, write_json
from ds_higgs.layout import AudioLayout

logger = logging.getLogger("ds_higgs")

_MARKER = "prepared.json"
_BATCH_SAMPLES = 16384
_ABANDONED_S = 14 * 86400.0  # no run is likely to read what was replaced so long ago, none still prepares
_PLACE_COLUMNS = ("file", "row", "frames")


@dataclass(frozen=True)
class SetMarker:
    """What a set says of itself.

    complete: whether all codes were there; else it only serves as a donor.
    sizes: bytes of its files; cache_sizes: of those of the code cache, which `ClipPlaces.file` counts.
    checksums: of columns that are read as a whole.
    """

    identity: Identity
    manifest_path: str
    complete: bool
    num_clips: int
    num_excluded: int
    problems: list[Problem] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    cache_sizes: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "SetMarker | None":
        """None where the folder is no set of this version, or has gone."""
        try:
            content = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
            content["identity"] = Identity(**content["identity"])
            content["problems"] = [Problem(**problem) for problem in content["problems"]]
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None


class PreparedSet:
    """A set that is there: its samples, and where their codes lie.

    Raises:
        DamagedFileError: it is not what was written; the message names the file.
    """

    def __init__(self, folder: Path, audio_root: Path):
        marker = SetMarker.read(folder)
        if marker is None:
            raise DamagedFileError(f"{folder / _MARKER}: not what was written")
        self.folder = folder
        self.marker = marker
        names = list(marker.sizes)
        for name, size in marker.sizes.items():
            path = folder / name
            if not path.exists() or path.stat().st_size != size:
                raise DamagedFileError(f"{path}: missing, or of another size than it was written with")
        tables = [read_table(folder / name) for name in names if name.startswith("samples/")]
        try:
            self.samples = SampleTable(pa.concat_tables([SAMPLE_SCHEMA.empty_table(), *tables]), audio_root)
        except pa.ArrowException as error:
            raise DamagedFileError(f"{folder / 'samples'}: not a table of samples: {error}") from None
        self.files = read_files(folder)
        self._places = read_table(folder / "places.arrow")
        _check(folder / "samples", self.samples.table, MEASURES, marker)
        _check(folder / "places.arrow", self._places, _PLACE_COLUMNS, marker)

        self.places = ClipPlaces(
            list(marker.cache_sizes), *(whole_column(self._places[name]) for name in _PLACE_COLUMNS)
        )

    def tokens(self, row: int, *, served: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """`SampleTable.tokens`, verified.

        Raises:
            UserError: the sample is not what was written.
        """
        if not self.is_intact(row):
            self.suspect()
            raise UserError(f"{self.folder}: sample {row} is damaged; start again: it is found and made anew")
        return self.samples.tokens(row, served=served)

    def is_intact(self, row: int) -> bool:
        """Whether a sample is what was written."""
        return self.samples.checksum(row) == self.samples.value("checksum", row)

    def suspect(self) -> None:
        """Have the next preparation look at every sample."""
        suspect(self.folder / "places.arrow")

    def is_suspect(self) -> bool:
        """Whether a training has found a sample damaged."""
        return any(is_suspect(self.folder / name) for name in self.marker.sizes)

    def has_codes(self, cache: Path) -> bool:
        """Whether the code cache's files are where they were, and no training has found one damaged."""
        return all(
            (cache / name).exists() and (cache / name).stat().st_size == size and not is_suspect(cache / name)
            for name, size in self.marker.cache_sizes.items()
        )


def read_files(folder: Path) -> pa.Table:
    """The audio files that a set's samples name, of AUDIO_FILE_SCHEMA."""
    return read_table(folder / "files.arrow")


def _check(path: Path, table: pa.Table, names: Sequence[str], marker: SetMarker) -> None:
    for name in names:
        if _checksum_of(table[name]) != marker.checksums[name]:
            raise DamagedFileError(f"{path}: the column {name!r} fails its checksum")


def _checksum_of(column: pa.ChunkedArray) -> int:
    found = 0
    for chunk in column.chunks:
        found = zlib.crc32(chunk.to_numpy(), found)
    return found


class PreparedSets:
    """All sets in a cache. Any number of processes may read and write it at once; none changes what it has written."""

    def __init__(self, cache_dir: Path):
        self.root = cache_dir / "prepared"

    def find(self, identity: Identity) -> Path | None:
        """The newest complete set."""
        sets = self._sets(f"{identity.name}-*")
        return next((path for path, marker in sets if marker.complete and marker.identity == identity), None)

    def find_donor(self, identity: Identity, manifest: Path) -> Path | None:
        """The newest set of the same rules, best of the same manifest."""
        of_rules = [(path, marker) for path, marker in self._sets("*-*") if marker.identity.rules == identity.rules]
        same = [path for path, marker in of_rules if marker.manifest_path == str(manifest.absolute())]
        return next(iter([*same, *(path for path, _ in of_rules)]), None)

    def find_of_manifest(self, identity: Identity) -> Path | None:
        """The newest set of a manifest's content, by whatever rules; best a complete one."""
        sets = [found for found in self._sets("*-*") if found[1].identity.manifest == identity.manifest]
        whole = [path for path, marker in sets if marker.complete]
        return next(iter([*whole, *(path for path, _ in sets)]), None)

    def new_draft(self) -> Path:
        """A folder for what is being made; those that killed processes have left go."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(".draft-*"):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        draft = self.root / f".draft-{uuid.uuid4().hex}"
        draft.mkdir()
        return draft

    def publish(self, partial: Path, identity: Identity) -> Path:
        """Give a written set its name; what it replaces goes, once no run is likely to read it any more."""
        folder = self.root / f"{identity.name}-{uuid.uuid4().hex[:8]}"
        settle_folder(partial)
        partial.rename(folder)
        sync_folder(self.root)
        for path, _ in self._sets(f"{identity.name}-*"):
            if path != folder and time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        return folder

    def _sets(self, pattern: str) -> Iterator[tuple[Path, SetMarker]]:
        """Newest first."""
        aged = [(path.stat().st_mtime_ns, path) for path in self.root.glob(pattern) if (path / _MARKER).exists()]
        for _, path in sorted(aged, reverse=True):
            if (marker := SetMarker.read(path)) is not None:
                yield path, marker


def write_set(
    folder: Path,
    samples: SampleTable,
    *,
    kept: np.ndarray,
    places: ClipPlaces,
    files: pa.Table,
    layout: AudioLayout,
    marker: SetMarker,
    cache: Path,
) -> None:
    """Write a set to an empty folder.

    Args:
        samples: analysed, all of them.
        kept: [samples] bool, those without a problem.
        places: of the clips of all samples, those of the others too.
        files: the audio files that samples may name.
        marker: without what only the writing tells.
        cache: folder of the code cache.

    Raises:
        UserError: a complete set lacks codes.
    """
    source = Path(marker.manifest_path).name
    checksums = dict.fromkeys(MEASURES, 0)
    (folder / "samples").mkdir(parents=True)
    with TableWriter(folder / "samples", SAMPLE_SCHEMA, lambda number: f"data-{number:05d}.arrow") as writer:
        done = 0
        for batch in coalesced(samples.table.to_batches(), _BATCH_SAMPLES):
            piece = SampleTable(pa.Table.from_batches([batch]), samples.audio_root)
            first, stop = samples.first_use(done), samples.first_use(done + len(batch))
            frames = places.frames[first:stop]
            table = with_measures(piece, frames, layout, source).filter(pa.array(kept[done : done + len(batch)]))
            for rows in table.combine_chunks().to_batches():
                writer.write(rows)
                for name in MEASURES:
                    checksums[name] = zlib.crc32(rows.column(name).to_numpy(), checksums[name])
            done += len(batch)
    describe_for_datasets(folder / "samples", writer.names)
    of_kept = np.repeat(kept, np.diff(samples.clip_ends, prepend=0))
    columns = {name: getattr(places, name)[of_kept] for name in _PLACE_COLUMNS}
    if marker.complete and (columns["row"] < 0).any():
        raise UserError(f"{cache}: codes have gone while the samples were prepared; start again: they are encoded anew")
    write_table(folder / "places.arrow", pa.table(columns))
    write_table(folder / "files.arrow", files)
    names = [*(f"samples/{name}" for name in writer.names), "places.arrow", "files.arrow"]
    written = asdict(marker) | {
        "sizes": {name: (folder / name).stat().st_size for name in names},
        "cache_sizes": {name: (cache / name).stat().st_size for name in places.names},
        "checksums": checksums | {name: zlib.crc32(values) for name, values in columns.items()},
    }
    write_json(folder / _MARKER, written)
