"""The code cache: encoded clips by content key, many to a safetensors shard, whose header is the shard's index.

A shard appears by rename, complete; its header holds each clip's length and checksum. What is cut off or altered is
found (`scan` sees a wrong size, `remove_corrupt` a wrong checksum) and removed, so that its clips are encoded again.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ds_higgs.errors import UserError
from ds_higgs.files import remove_leftovers, write_atomically

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


class CodeCache:
    """All clips of one codec below `cache_dir`. Any number of processes may read and write it at once."""

    def __init__(self, cache_dir: Path, codec_identity: str):
        self.codec_identity = codec_identity
        self.folder = cache_dir / "codes" / codec_identity[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
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
            except (ValueError, KeyError, TypeError, AttributeError):
                path.unlink(missing_ok=True)
                continue
            except FileNotFoundError:  # another process found it corrupt
                continue
            self._scanned.add(path.name)
            self._clips.update(clips)

    def remove_corrupt(self, *, share: int = 0, shares: int = 1) -> list[str]:
        """Check the checksums of every `shares`-th shard and delete those that fail; their names."""
        remove_leftovers(self.folder)
        self.scan()
        shards: dict[str, list[CachedClip]] = {}
        for clip in self._clips.values():
            shards.setdefault(clip.shard, []).append(clip)
        corrupt = [name for name in sorted(shards)[share::shares] if not self._is_intact(name, shards[name])]
        for name in corrupt:
            (self.folder / name).unlink(missing_ok=True)
            self._scanned.discard(name)
        self._clips = {key: clip for key, clip in self._clips.items() if clip.shard not in set(corrupt)}
        return corrupt

    def add_shard(self, clips: Mapping[str, EncodedClip]) -> None:
        """Write clips as one shard, whole or not at all."""
        tensors = {key: clip.codes.to(torch.int16).contiguous() for key, clip in clips.items()}
        index = {key: [_checksum(tensors[key].numpy().tobytes()), clips[key].seconds] for key in tensors}
        metadata = {"codec": self.codec_identity, "clips": json.dumps(index)}
        name = hashlib.sha256("".join(sorted(clips)).encode()).hexdigest()[:24]
        write_atomically(self.folder / f"shard-{name}.safetensors", save(tensors, metadata=metadata))
        self.scan()

    def read(self, key: str) -> torch.Tensor:
        """[codebooks, frames] int64 codes of a clip."""
        return read_codes(self.folder, self._clips[key])

    def _is_intact(self, name: str, clips: Sequence[CachedClip]) -> bool:
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
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
    """Raises ValueError, KeyError, TypeError or AttributeError where the file is not a whole shard."""
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if header_size > size:
            raise ValueError("cut off")
        header = json.loads(file.read(header_size))
    index = json.loads(header.pop("__metadata__")["clips"])
    start = 8 + header_size
    if size != start + max(entry["data_offsets"][1] for entry in header.values()):
        raise ValueError("cut off")
    clips = {}
    for key, entry in header.items():
        checksum, seconds = index[key]
        codebooks, frames = entry["shape"]
        clips[key] = CachedClip(path.name, start + entry["data_offsets"][0], codebooks, frames, checksum, seconds)
    return clips


def _num_bytes(clip: CachedClip) -> int:
    return 2 * clip.num_codebooks * clip.num_frames


def _checksum(content: bytes) -> int:
    return zlib.crc32(content)
