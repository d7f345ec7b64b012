"""Encode the clips that the cache lacks: in units that processes claim, so that each clip is encoded once."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_higgs.data.audio import decode
from ds_higgs.data.cache import CodeCache, EncodedClip
from ds_higgs.data.clips import Clip
from ds_higgs.data.codec import AudioCodec
from ds_higgs.data.files import NumberLocks
from ds_higgs.data.problems import BadSampleError

UNIT_CLIPS = 64
UNIT_SECONDS = 600.0
DECODING_THREADS = 4

Progress = Callable[[int, int], None]  # clips done, clips in all


@dataclass(frozen=True)
class Unit:
    """Clips of about equal length that one process encodes at a time and writes as one shard.

    number: of its lock; the same for all processes that prepare the same manifest.
    """

    number: int
    clips: tuple[Clip, ...]


def plan_units(clips: Iterable[Clip]) -> list[Unit]:
    """Cut the distinct clips of a manifest into units, whatever the cache already holds."""
    distinct = {clip.key: clip for clip in clips}
    units: list[Unit] = []
    members: list[Clip] = []
    seconds = 0.0
    for clip in sorted(distinct.values(), key=lambda clip: (clip.seconds, clip.key)):
        if members and (len(members) == UNIT_CLIPS or seconds + clip.seconds > UNIT_SECONDS):
            units.append(_unit(members))
            members, seconds = [], 0.0
        members.append(clip)
        seconds += clip.seconds
    return units + ([_unit(members)] if members else [])


class Encoder:
    """Encodes units into the cache; see `encode_all`.

    load_codec: called when the first clip is to be encoded; None decodes and checks the audio and encodes nothing.
    failures: by key, the clips that cannot be used.
    """

    def __init__(self, cache: CodeCache, manifest: Path, load_codec: Callable[[], AudioCodec] | None, *, rate: int):
        self.failures: dict[str, BadSampleError] = {}
        self.num_encoded = 0
        self._cache = cache
        self._manifest = manifest
        self._load_codec = load_codec
        self._rate = rate
        self._codec: AudioCodec | None = None

    def encode_all(self, units: Sequence[Unit], *, first: int = 0, progress: Progress | None = None) -> None:
        """Leave no unit with a missing clip, apart from `failures`.

        Units that another process is at are left to it at first, and looked at again at the end: it may have been
        killed. Ranks begin at different units (`first`), to meet less often.
        """
        locks = NumberLocks(self._cache.folder / "units.lock")
        total = sum(len(unit.clips) for unit in units)
        pending = [*units[first:], *units[:first]]
        done = 0
        for wait in (False, True):
            left = []
            for unit in pending:
                if not self._encode_unit(unit, locks, wait=wait):
                    left.append(unit)
                    continue
                done += len(unit.clips)
                if progress is not None:
                    progress(done, total)
            pending = left

    def _encode_unit(self, unit: Unit, locks: NumberLocks, *, wait: bool) -> bool:
        """False where another process holds the unit."""
        if not self._missing(unit):
            return True
        with locks.hold(unit.number, wait=wait) as held:
            if not held:
                return False
            self._cache.scan()
            self._encode_clips(self._missing(unit))
        return True

    def _missing(self, unit: Unit) -> list[Clip]:
        return [clip for clip in unit.clips if clip.key not in self._cache and clip.key not in self.failures]

    def _encode_clips(self, clips: Sequence[Clip]) -> None:
        with ThreadPoolExecutor(DECODING_THREADS) as threads:
            decoded = list(threads.map(self._decode, clips))
        usable = []
        for clip, waveform in zip(clips, decoded, strict=True):
            if isinstance(waveform, BadSampleError):
                self.failures[clip.key] = waveform
            else:
                usable.append((clip, waveform))
        if usable and self._load_codec is not None:
            self._codec = self._codec or self._load_codec()
            codes = self._codec.encode([waveform for _, waveform in usable])
            shard = {clip.key: EncodedClip(row, clip.seconds) for (clip, _), row in zip(usable, codes, strict=True)}
            self._cache.add_shard(shard)
            self.num_encoded += len(shard)

    def _decode(self, clip: Clip) -> np.ndarray | BadSampleError:
        try:
            return decode(clip.source(self._manifest), clip.segment, sampling_rate=self._rate)
        except BadSampleError as error:
            return error


def _unit(members: Sequence[Clip]) -> Unit:
    digest = hashlib.sha256("".join(clip.key for clip in members).encode()).hexdigest()
    return Unit(int(digest[:15], 16), tuple(members))
