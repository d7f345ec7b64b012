"""The code cache: encoded clips by content key, many to a safetensors shard, whose header is the shard's index.

A shard appears by rename, complete; its header holds each clip's length and checksum, and a checksum of these. What is
cut off or altered is found (`scan` sees a wrong size or header, `remove_corrupt` a wrong checksum) and removed, so that
its clips are encoded again. A cache that cannot be written is read as it is.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ds_higgs.errors import UserError
from ds_higgs.files import remove_leftovers, write_atomically

logger = logging.getLogger("ds_higgs")

SHARD_PATTERN = "shard-*.safetensors"
KEY_BYTES = 16


@dataclass(frozen=True)
class EncodedClip:
    """codes: [codebooks, frames] int64; seconds: length of the decoded audio, before padding to whole frames."""

    codes: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class CachedClip:
    """Where a clip's codes lie."""

    shard: str
    offset: int  # in bytes from the file's start
    num_codebooks: int
    num_frames: int
    checksum: int
    seconds: float


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


class CodeCache:
    """All clips of one codec below `cache_dir`. Any number of processes may read and write it at once."""

    def __init__(self, cache_dir: Path, codec_identity: str):
        self.codec_identity = codec_identity
        self.folder = codes_folder(cache_dir, codec_identity)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.listdir(self.folder)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {cache_dir}: {error.strerror} ({error.filename}); expected a folder that can be "
                "written, or another user's that can be read and holds all codes"
            ) from None
        self._clips: dict[str, CachedClip] = {}
        self._scanned: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._clips

    def __getitem__(self, key: str) -> CachedClip:
        return self._clips[key]

    def __len__(self) -> int:
        return len(self._clips)

    def scan(self) -> None:
        """Take up shards that have appeared since the last scan; delete those that are not readable as shards."""
        for path in sorted(self.folder.glob(SHARD_PATTERN)):
            if path.name in self._scanned:
                continue
            try:
                clips = _read_shard_index(path)
            except FileNotFoundError:  # another process found it damaged
                continue
            except OSError as error:  # it may be whole, so it stays
                logger.warning("%s: cannot be read: %s", path, error.strerror)
                clips = {}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if self._delete(path.name, f"no whole shard: {error!r}"):
                    continue
                clips = {}
            self._scanned.add(path.name)
            self._clips.update(clips)

    def remove_corrupt(self, *, share: int = 0, shares: int = 1) -> list[str]:
        """Check the checksums of every `shares`-th shard and delete those that fail.

        Returns:
            The names of those that could not be deleted; see `leave_out`.
        """
        remove_leftovers(self.folder)
        self.scan()
        shards: dict[str, list[CachedClip]] = {}
        for clip in self._clips.values():
            shards.setdefault(clip.shard, []).append(clip)
        corrupt = [name for name in sorted(shards)[share::shares] if not self._is_intact(name, shards[name])]
        self.leave_out(corrupt)
        left = [name for name in corrupt if not self._delete(name, "codes that fail their checksum")]
        self._scanned -= set(corrupt) - set(left)
        return left

    def leave_out(self, shards: Iterable[str]) -> None:
        """Have no clips of these shards, now and at later scans."""
        names = set(shards)
        self._scanned |= names
        self._clips = {key: clip for key, clip in self._clips.items() if clip.shard not in names}

    def check_writable(self, num_missing: int) -> None:
        """Raises UserError where the clips that are missing cannot be added."""
        try:
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise self._not_written(error, f" to add {num_missing} missing clips") from None

    def add_shard(self, clips: Mapping[str, EncodedClip]) -> None:
        """Write clips as one shard, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        tensors = {key: clip.codes.to(torch.int16).contiguous() for key, clip in clips.items()}
        index = json.dumps({key: [_checksum(tensors[key].numpy().tobytes()), clips[key].seconds] for key in tensors})
        metadata = {"codec": self.codec_identity, "clips": index, "checksum": str(_checksum(index.encode()))}
        name = f"shard-{hashlib.sha256(''.join(sorted(clips)).encode()).hexdigest()[:24]}.safetensors"
        try:
            write_atomically(self.folder / name, save(tensors, metadata=metadata))
        except OSError as error:
            raise self._not_written(error) from None
        self._scanned.discard(name)
        self.scan()

    def read(self, key: str) -> torch.Tensor:
        """[codebooks, frames] int64 codes of a clip."""
        return read_codes(self.folder, self._clips[key])

    def _not_written(self, error: OSError, purpose: str = "") -> UserError:
        return UserError(f"data.cache_dir: {self.folder} cannot be written{purpose}: {error.strerror}")

    def _delete(self, name: str, reason: str) -> bool:
        """False where the shard cannot be deleted."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: damaged (%s), and left: %s", self.folder / name, reason, error.strerror)
            return False
        logger.warning("%s: damaged (%s), deleted: its clips are encoded again", self.folder / name, reason)
        return True

    def _is_intact(self, name: str, clips: Sequence[CachedClip]) -> bool:
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            return False
        return all(_checksum(content[clip.offset : clip.offset + _num_bytes(clip)]) == clip.checksum for clip in clips)


def read_codes(folder: Path, clip: CachedClip) -> torch.Tensor:
    """[codebooks, frames] int64 codes.

    Raises:
        UserError: the shard has changed since it was scanned.
    """
    content = _read_clip(folder, clip)
    if content is None:
        _map_shard.cache_clear()  # the shard may have been encoded anew since it was mapped
        content = _read_clip(folder, clip)
    if content is None:
        raise UserError(f"{folder / clip.shard}: the code cache is damaged; start again: it is found and encoded anew")
    codes = np.frombuffer(content, dtype="<i2").reshape(clip.num_codebooks, clip.num_frames)
    return torch.from_numpy(codes.astype(np.int64))


def _read_clip(folder: Path, clip: CachedClip) -> bytes | None:
    """The clip's bytes, or None where they are not what was written."""
    try:
        content = _map_shard(folder / clip.shard)[clip.offset : clip.offset + _num_bytes(clip)].tobytes()
    except (OSError, ValueError):
        return None
    return content if len(content) == _num_bytes(clip) and _checksum(content) == clip.checksum else None


@lru_cache(maxsize=512)
def _map_shard(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint8, mode="r")


def _read_shard_index(path: Path) -> dict[str, CachedClip]:
    """Raises ValueError, KeyError, TypeError, AttributeError or RecursionError where the file is not a whole shard."""
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if header_size > size:
            raise ValueError("cut off")
        header = json.loads(file.read(header_size))
    metadata = header.pop("__metadata__")
    # Shards of before there was a checksum are taken as they are.
    if "checksum" in metadata and metadata["checksum"] != str(_checksum(metadata["clips"].encode())):
        raise ValueError("the index fails its checksum")
    index = json.loads(metadata["clips"])
    if not header or set(header) != set(index):
        raise ValueError("the index does not fit the tensors")
    clips = {key: _cached_clip(path.name, 8 + header_size, header[key], *index[key]) for key in header}
    if size != max(clip.offset + _num_bytes(clip) for clip in clips.values()):
        raise ValueError("cut off")
    return clips


def _cached_clip(shard: str, start: int, entry: dict, checksum: int, seconds: float) -> CachedClip:
    codebooks, frames = entry["shape"]
    first, stop = entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (codebooks, frames, first, stop, checksum)):
        raise ValueError("numbers that are no sizes")
    clip = CachedClip(shard, start + first, codebooks, frames, checksum, float(seconds))
    if _num_bytes(clip) != stop - first or checksum >> 32 or not math.isfinite(clip.seconds):
        raise ValueError("numbers that do not fit each other")
    return clip


def _num_bytes(clip: CachedClip) -> int:
    return 2 * clip.num_codebooks * clip.num_frames


def _checksum(content: bytes) -> int:
    return zlib.crc32(content)
