"""Encode the clips that the cache lacks: in units that processes claim, so that each clip is encoded once."""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from ds_higgs.data.audio import decode
from ds_higgs.data.cache import CodeCache, EncodedClip
from ds_higgs.data.clips import Clip
from ds_higgs.data.codec.source import AudioCodec, CodecSource
from ds_higgs.data.problems import BadSampleError
from ds_higgs.errors import UserError
from ds_higgs.files import NumberLocks

UNIT_CLIPS = 64
UNIT_SECONDS = 600.0
DECODING_THREADS = 4
SECONDS_BETWEEN_LOOKS = 0.2  # at units that other processes are at

Progress = Callable[[int, int], None]  # clips done, clips that were missing at the start


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

    failures: by key, the clips that cannot be used.
    num_encoded: clips that this process has encoded.

    Args:
        load_codec: called when the first clip is to be encoded; None decodes and checks the audio, encodes nothing.
        rate: sampling rate that clips are decoded to.
        progress: called with each clip that is done.
        stop: asked before each unit and after each clip: a unit can take a codec many minutes.
    """

    def __init__(
        self,
        cache: CodeCache,
        manifest: Path,
        load_codec: Callable[[], AudioCodec] | None,
        *,
        rate: int,
        progress: Progress | None = None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.failures: dict[str, BadSampleError] = {}
        self.num_encoded = 0
        self._cache = cache
        self._manifest = manifest
        self._load_codec = load_codec
        self._rate = rate
        self._progress = progress
        self._stop = stop
        self._codec: AudioCodec | None = None
        self._num_checked = 0
        self._num_missing = 0
        self._num_cached = 0

    def encode_all(self, units: Sequence[Unit], *, first: int = 0) -> None:
        """Leave no unit with a missing clip, apart from `failures`; or stop, with what is encoded in the cache.

        Units that another process is at are left to it at first, and looked at again at the end: it may have been
        killed. Processes begin at different units (`first`), to meet less often.
        """
        self._num_missing = sum(len(self._missing(unit)) for unit in units)
        self._num_cached = len(self._cache)
        if not self._num_missing:
            return
        self._tell()
        locks = NumberLocks(self._cache.folder / "units.lock")
        pending = [*units[first:], *units[:first]]
        while pending and not self._stop():
            left = [unit for unit in pending if self._stop() or not self._encode_unit(unit, locks)]
            if len(left) == len(pending):  # other processes are at all of them
                time.sleep(SECONDS_BETWEEN_LOOKS)
            pending = left

    def _encode_unit(self, unit: Unit, locks: NumberLocks) -> bool:
        """False where another process holds the unit."""
        if not self._missing(unit):
            return True
        with locks.hold(unit.number) as held:
            if held:
                self._cache.scan()
                self._encode_clips(self._missing(unit))
                self._tell()
        return held

    def _missing(self, unit: Unit) -> list[Clip]:
        return [clip for clip in unit.clips if clip.key not in self._cache and clip.key not in self.failures]

    def _encode_clips(self, clips: Sequence[Clip]) -> None:
        usable = self._decode_all(clips)
        if self._load_codec is None:
            self._num_checked += len(usable)
        elif usable:
            self._codec = self._codec or self._load_codec()
            shard = self._encode_until_stopped(self._codec, usable)
            self._cache.add_shard(shard)
            self.num_encoded += len(shard)

    def _decode_all(self, clips: Sequence[Clip]) -> list[tuple[Clip, np.ndarray]]:
        """The clips that can be used, with their audio; the others are `failures`."""
        with ThreadPoolExecutor(DECODING_THREADS) as threads:
            decoded = list(threads.map(self._decode, clips))
        usable = []
        for clip, waveform in zip(clips, decoded, strict=True):
            if isinstance(waveform, BadSampleError):
                self.failures[clip.key] = waveform
                self._num_checked += 1
            else:
                usable.append((clip, waveform))
        return usable

    def _encode_until_stopped(
        self, codec: AudioCodec, usable: Sequence[tuple[Clip, np.ndarray]]
    ) -> dict[str, EncodedClip]:
        shard = {}
        for index, codes in codec.encode_each([waveform for _, waveform in usable]):
            clip, waveform = usable[index]
            _check_whole(codes, waveform, codec.hop_length)
            shard[clip.key] = EncodedClip(codes, clip.seconds)
            if self._stop():
                break
            self._tell(at_hand=len(shard))
        return shard

    def _tell(self, at_hand: int = 0) -> None:
        """How many clips are done, with those that are encoded and not yet in the cache."""
        if self._progress is not None:
            done = len(self._cache) - self._num_cached + self._num_checked + at_hand
            self._progress(min(done, self._num_missing), self._num_missing)

    def _decode(self, clip: Clip) -> np.ndarray | BadSampleError:
        try:
            return decode(clip.source(self._manifest), clip.segment, sampling_rate=self._rate)
        except BadSampleError as error:
            return error


def _unit(members: Sequence[Clip]) -> Unit:
    digest = hashlib.sha256("".join(clip.key for clip in members).encode()).hexdigest()
    return Unit(int(digest[:15], 16), tuple(members))


def start_helpers(
    count: int, manifest: Path, cache_dir: Path, codec: CodecSource, units: Sequence[Unit], devices: Sequence[str]
) -> list[BaseProcess]:
    """Start processes that encode units beside the caller; they end with the work, or with the caller."""
    context = multiprocessing.get_context("spawn")
    helpers: list[BaseProcess] = []
    for number in range(count):
        first = (number + 1) * len(units) // (count + 1)
        device = devices[(number + 1) % len(devices)]
        arguments = (manifest, cache_dir, codec, units, device, first, os.getpid())
        helper = context.Process(target=_help, args=arguments, daemon=True)
        with _started_without_interrupts():
            helper.start()
        helpers.append(helper)
    return helpers


@contextmanager
def _started_without_interrupts() -> Iterator[None]:
    """A process started meanwhile ignores Ctrl-C from its first moment: its parent tells, and ends it."""
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _help(
    manifest: Path, cache_dir: Path, codec: CodecSource, units: Sequence[Unit], device: str, first: int, parent: int
) -> None:
    cache = CodeCache(cache_dir, codec.identity)
    cache.scan()
    encoder = Encoder(
        cache,
        manifest,
        lambda: codec.load(device),
        rate=codec.sampling_rate,
        stop=lambda: os.getppid() != parent,
    )
    encoder.encode_all(units, first=first)


def _check_whole(codes: torch.Tensor, waveform: np.ndarray, hop_length: int) -> None:
    """Raises UserError for a codec that leaves a clip's end out: the model would learn to stop too early."""
    needed = -(-len(waveform) // hop_length)
    if codes.shape[1] < needed:
        raise UserError(
            f"the audio codec cuts clips at their end: {codes.shape[1]} code frames for {len(waveform)} samples, "
            f"expected {needed}"
        )
