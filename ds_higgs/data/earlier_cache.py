"""Codes as earlier versions kept them, only read here: many clips to a safetensors shard, whose header is its index.

A shard's header holds each clip's length and checksum, and a checksum of these.
"""

import json
import logging
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ds_higgs.data.clip_files import EncodedClip

logger = logging.getLogger("ds_higgs")

SHARD_PATTERN = "shard-*.safetensors"


def read_shard(path: Path) -> dict[str, EncodedClip]:
    """The clips of a shard, by key; those that are not what was written are left out, with a warning.

    Raises:
        OSError: it cannot be read; it may be whole.
    """
    content = path.read_bytes()
    try:
        clips = dict(_clips_in(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s: damaged (no whole shard: %r): its clips are encoded again", path, error)
        return {}
    whole = {key: clip for key, clip in clips.items() if clip is not None}
    if len(whole) < len(clips):
        left_out = len(clips) - len(whole)
        logger.warning("%s: damaged (%d clips fail their checksum): they are encoded again", path, left_out)
    return whole


def _clips_in(content: bytes) -> Iterator[tuple[str, EncodedClip | None]]:
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError("cut off")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__")
    # Shards of before there was a checksum are taken as they are.
    if "checksum" in metadata and metadata["checksum"] != str(zlib.crc32(metadata["clips"].encode())):
        raise ValueError("the index fails its checksum")
    index = json.loads(metadata["clips"])
    if not header or set(header) != set(index):
        raise ValueError("the index does not fit the tensors")
    if len(content) - start != max(entry["data_offsets"][1] for entry in header.values()):
        raise ValueError("cut off")
    for key, entry in header.items():
        checksum, seconds = index[key]
        yield key, _clip(content[start:], entry["shape"], entry["data_offsets"], checksum, float(seconds))


def _clip(content: bytes, shape: list[int], offsets: list[int], checksum: int, seconds: float) -> EncodedClip | None:
    """None where its bytes are not what was written."""
    (codebooks, frames), (first, stop) = shape, offsets
    if any(type(number) is not int or number < 0 for number in (codebooks, frames, first, stop, checksum)):
        raise ValueError("numbers that are no sizes")
    if 2 * codebooks * frames != stop - first or checksum >> 32 or not math.isfinite(seconds):
        raise ValueError("numbers that do not fit each other")
    if zlib.crc32(content[first:stop]) != checksum:
        return None
    codes = np.frombuffer(content[first:stop], dtype="<i2").reshape(codebooks, frames)
    return EncodedClip(torch.from_numpy(codes.copy()), seconds)
