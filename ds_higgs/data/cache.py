"""The code cache: encoded clips of one codec by content key, in Arrow files that are mapped into memory.

`clips-*.arrow` are large, appear whole and never change. What has just been encoded lies in `units/`, a file a unit of
work, until `tidy` joins such files, and those of earlier versions, to large ones. Every clip has a checksum, verified
whenever its bytes are read. A cache that cannot be written is read as it is.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ds_higgs.data.arrow_files import (
    DamagedFileError,
    TableWriter,
    coalesced,
    describe_for_datasets,
    is_suspect,
    remove_file,
    suspect,
    write_table,
)
from ds_higgs.data.clip_files import CLIP_SCHEMA, ClipFile, EncodedClip, clips_to_batch
from ds_higgs.data.earlier_cache import SHARD_PATTERN, read_shard
from ds_higgs.data.key_index import KEY_BYTES, KeyIndex
from ds_higgs.errors import UserError
from ds_higgs.files import NumberLocks, remove_leftovers

logger = logging.getLogger("ds_higgs")

_BATCH_CLIPS = 4096  # of a large file
_SMALL_BYTES = 32 << 20
_MAX_SMALL_FILES = 8
SECONDS_BETWEEN_LOOKS = 0.2  # at what other processes are at
_TIDYING = 1 << 61  # a lock's number; units have smaller ones


@dataclass(frozen=True)
class ClipPlaces:
    """Where clips' codes lie: [clips] each.

    names: of files in the cache's folder; file: an index into them; row: in that file.
    """

    names: list[str]
    file: np.ndarray
    row: np.ndarray
    frames: np.ndarray

    def of(self, clips: np.ndarray) -> "ClipPlaces":
        """The places of some clips, in their order, maybe more than once."""
        return ClipPlaces(self.names, self.file[clips], self.row[clips], self.frames[clips])


def default_code_cache() -> Path:
    """The user's code cache, which all runs share."""
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "ds_higgs" / "codes"


def clip_key(content_hash: str, *, offset: float, duration: float | None, codec_identity: str) -> str:
    """The key of a clip: the content of its audio, the segment and the codec."""
    text = json.dumps([content_hash, offset, duration, codec_identity])
    return hashlib.sha256(text.encode()).hexdigest()[: 2 * KEY_BYTES]


def codes_folder(cache_dir: Path, codec_identity: str) -> Path:
    """Where the codes of one codec are kept."""
    return cache_dir / "codes" / codec_identity[:16]


def tell_of_former_codes(cache_dir: Path, former_identity: str | None, num_missing: int) -> None:
    """Say so where codes lie that were made under an identity which said less."""
    folder = codes_folder(cache_dir, former_identity) if former_identity is not None else None
    if folder is not None and folder.is_dir():
        logger.warning(
            "%s: codes of an earlier version, which did not record the codec's semantic model: they are left, "
            "and %d clips are encoded anew; the folder can be deleted",
            folder,
            num_missing,
        )


class CodeCache:
    """All clips of one codec below `cache_dir`. Any number of processes may read and write it at once.

    folder: a folder of `datasets`, too, once it is tidy.

    Args:
        alone: whoever else works here is at units of its own: no lock is taken.
    """

    def __init__(self, cache_dir: Path, codec_identity: str, *, alone: bool = False):
        self._alone = alone
        self.codec_identity = codec_identity
        self.folder = codes_folder(cache_dir, codec_identity)
        self._units = self.folder / "units"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.listdir(self.folder)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {cache_dir}: {error.strerror} ({error.filename}); expected a folder that can be "
                "written, or another user's that can be read and holds all codes"
            ) from None
        self._files: dict[str, ClipFile] = {}
        self._unreadable: set[str] = set()
        self._index_files()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return self._index.find_one(bytes.fromhex(key)) >= 0

    def seconds_of(self, key: str) -> float | None:
        """Length of a clip, None where it is not in the cache."""
        row = self._index.find_one(bytes.fromhex(key))
        return None if row < 0 else float(self._seconds[row])

    def read(self, key: str) -> torch.Tensor:
        """[codebooks, frames] int64 codes of a clip.

        Raises:
            KeyError: it is not in the cache.
            UserError: it is damaged.
        """
        row = self._index.find_one(bytes.fromhex(key))
        if row < 0:
            raise KeyError(key)
        places = self.places(np.asarray([row]))
        return ClipReader(self.folder, places.names).read(int(places.file[0]), int(places.row[0]))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[n, KEY_BYTES] uint8 -> [n] int64 numbers of the clips, for `places`; -1 where one is not in the cache."""
        return self._index.find(keys)

    def places(self, numbers: np.ndarray) -> ClipPlaces:
        """Where clips lie, by the numbers that `find` gives; file and row -1 for those that are not in the cache."""
        ends = np.cumsum([len(file) for file in self._files.values()], dtype=np.int64)
        starts = np.concatenate([[0], ends])
        file, row, frames = (np.full(len(numbers), nothing, dtype=np.int32) for nothing in (-1, -1, 0))
        found = numbers >= 0
        of_file = np.searchsorted(ends, numbers[found], side="right")
        used, file[found] = np.unique(of_file, return_inverse=True)
        row[found] = numbers[found] - starts[of_file]
        frames[found] = self._frames[numbers[found]]
        names = list(self._files)
        return ClipPlaces([names[number] for number in used], file, row, frames)

    def scan(self) -> None:
        """Take up files that have come and gone since the last scan; delete those that are no whole files."""
        self._take_up(self._list_files() + self._list_units())

    def missing(self, unit: int, keys: np.ndarray) -> np.ndarray:
        """Which of a unit's clips nobody has added so far, [n] bool; cheap, however many units there are.

        Args:
            keys: [n, KEY_BYTES] uint8.
        """
        self._take_up(self._list_files() + [name for name in self._files if name.startswith("units/")])
        absent = self.find(keys) < 0
        name = self._unit_name(unit)
        if name not in self._files and (self.folder / name).exists() and (file := self._open(name)) is not None:
            absent &= KeyIndex(file.keys).find(keys) < 0
        return absent

    def check_writable(self, num_missing: int) -> None:
        """Raises UserError where the clips that are missing cannot be added."""
        try:
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise self._not_written(error, f" to add {num_missing} missing clips") from None

    def add(self, clips: Mapping[str, EncodedClip], *, unit: int | None = None) -> None:
        """Write clips, by key, as one file, whole or not at all; `scan` takes it up.

        Args:
            unit: number of the unit that they are part of; what of it was there before stays.

        Raises:
            UserError: it cannot be written.
        """
        if unit is None:
            unit = int(hashlib.sha256("".join(sorted(clips)).encode()).hexdigest()[:15], 16)
        name = self._unit_name(unit)
        before = self._open(name) if (self.folder / name).exists() else None
        batches = [batch for batch, _ in before.intact_batches()] if before is not None else []
        table = pa.Table.from_batches([*batches, clips_to_batch(clips, self.codec_identity)]).combine_chunks()
        try:
            self._units.mkdir(exist_ok=True)
            write_table(self.folder / name, table)
        except OSError as error:
            raise self._not_written(error) from None
        self._files.pop(name, None)

    def tidy(self) -> None:
        """Join small files, files of earlier versions and what is intact of damaged ones to large files.

        Where the cache cannot be written nothing happens.
        """
        if not os.access(self.folder, os.W_OK):
            return
        locks = self.locks()
        while not self._tidy(locks):  # what another process joins now must not go while its places are looked up
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self.scan()

    def locks(self) -> NumberLocks:
        """Of units, by number; where nobody else works here every one can be had, and no file is touched."""
        return NumberLocks(None if self._alone else self.folder / "units.lock")

    def intact_batches(self) -> Iterator[pa.RecordBatch]:
        """All clips that are what was written; files that hold others are suspect from then on."""
        return self._batches_of([self.folder / name for name in [*self._list_files(), *self._list_units()]], [])

    def add_batches(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Write clips that are encoded already to large files; `scan` takes them up.

        Raises:
            UserError: they cannot be written.
        """
        try:
            with TableWriter(self.folder, CLIP_SCHEMA, lambda _: f"clips-{uuid.uuid4().hex}.arrow") as writer:
                for batch in coalesced(batches, _BATCH_CLIPS):
                    writer.write(batch)
        except OSError as error:
            raise self._not_written(error) from None

    def _tidy(self, locks: NumberLocks) -> bool:
        """False where another process is at it."""
        with locks.hold(_TIDYING) as held:
            if not held:
                return False
            remove_leftovers(self.folder)
            remove_leftovers(self._units)
            earlier = sorted(self.folder.glob(SHARD_PATTERN))
            joined = [self.folder / name for name in [*self._list_units(), *self._list_joinable()]]
            if not joined and not earlier:
                return True
            self.add_batches(self._batches_of(joined, earlier))
            for path in [*joined, *earlier]:
                remove_file(path)
            describe_for_datasets(self.folder, self._list_files())
        return True

    def _batches_of(self, files: Sequence[Path], earlier: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        for path in files:
            file = self._open(str(path.relative_to(self.folder)))
            damaged = 0
            for batch, count in file.intact_batches() if file is not None else ():
                damaged += count
                yield batch
            if damaged:
                suspect(path)
                logger.warning("%s: damaged (%d clips fail their checksum): they are encoded again", path, damaged)
        for path in earlier:
            if clips := read_shard(path):
                yield clips_to_batch(clips, self.codec_identity)

    def _list_files(self) -> list[str]:
        return sorted(name for name in os.listdir(self.folder) if name.startswith("clips-") and name.endswith(".arrow"))

    def _list_units(self) -> list[str]:
        return sorted(f"units/{path.name}" for path in self._units.glob("*.arrow"))

    def _list_joinable(self) -> list[str]:
        """Damaged files, and small ones where there are many."""
        paths = [self.folder / name for name in self._list_files()]
        small = [path.name for path in paths if path.stat().st_size < _SMALL_BYTES]
        found = {path.name for path in paths if is_suspect(path)}
        return sorted(found | set(small if len(small) > _MAX_SMALL_FILES else []))

    def _unit_name(self, unit: int) -> str:
        return f"units/{unit:015x}.arrow"

    def _take_up(self, names: Iterable[str]) -> None:
        names = [name for name in names if name not in self._unreadable]
        if set(names) == set(self._files):
            return
        opened = {name: self._files.get(name) or self._open(name) for name in names}
        self._files = {name: file for name, file in opened.items() if file is not None}
        self._index_files()

    def _index_files(self) -> None:
        files = self._files.values()
        self._index = KeyIndex(np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *(file.keys for file in files)]))
        self._seconds = np.concatenate([np.zeros(0), *(file.seconds for file in files)])
        self._frames = np.concatenate([np.zeros(0, np.int32), *(file.frames for file in files)])

    def _open(self, name: str) -> ClipFile | None:
        """None where the file has gone, cannot be read, or is no whole file, which is then deleted."""
        path = self.folder / name
        try:
            return ClipFile(path)
        except FileNotFoundError:  # another process has joined it to a large one
            return None
        except OSError as error:  # it may be whole, so it stays
            logger.warning("%s: cannot be read: %s", path, error.strerror)
        except DamagedFileError as error:
            remove_file(path)
            fate = "left as it is" if path.exists() else "deleted: its clips are encoded again"
            logger.warning("%s: damaged (%s), %s", path, error, fate)
        self._unreadable.add(name)
        return None

    def _not_written(self, error: OSError, purpose: str = "") -> UserError:
        earlier = any(self.folder.glob(SHARD_PATTERN))
        hint = "; what an earlier version has encoded there is taken over by who can write it" if earlier else ""
        return UserError(f"data.cache_dir: {self.folder} cannot be written{purpose}: {error.strerror}{hint}")


class ClipReader:
    """Codes by place: all that a training needs of the cache.

    Raises:
        FileNotFoundError, DamagedFileError: a file is gone, or not whole.
    """

    def __init__(self, folder: Path, names: Sequence[str]):
        self._files = [ClipFile(folder / name) for name in names]

    def read(self, file: int, row: int) -> torch.Tensor:
        """[codebooks, frames] int64 codes.

        Raises:
            UserError: they are not what was written.
        """
        codes = self._files[file].read(row)
        if codes is None:
            path = self._files[file].path
            suspect(path)
            raise UserError(f"{path}: the code cache is damaged; start again: what is damaged is encoded anew")
        return torch.from_numpy(codes.astype(np.int64))
