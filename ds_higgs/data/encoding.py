"""Encode the clips that the cache lacks: in units that processes claim, so that each clip is encoded once."""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ds_higgs.data.audio import decode
from ds_higgs.data.cache import SECONDS_BETWEEN_LOOKS, CodeCache
from ds_higgs.data.clip_files import EncodedClip
from ds_higgs.data.clips import Clip
from ds_higgs.data.code_names import holds_codes
from ds_higgs.data.codec.source import AudioCodec, CodecSource
from ds_higgs.data.codes import load_array
from ds_higgs.data.problems import BadSampleError
from ds_higgs.errors import UserError
from ds_higgs.files import NumberLocks

UNIT_CLIPS = 64
UNIT_SECONDS = 600.0
DECODING_THREADS = 4

Progress = Callable[[int, int], None]  # clips done, clips that were missing at the start


class ClipList(Protocol):
    """Distinct clips, by number.

    keys: [clips, KEY_BYTES] uint8; seconds: [clips].
    """

    keys: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Clip: ...

    def reading_places(self) -> np.ndarray | None:
        """[clips, 2], the file around each and its place there, where clips lie in larger files."""
        ...


@dataclass(frozen=True)
class Unit:
    """Clips of about equal length that one process encodes at a time and writes as one file.

    number: of its lock and its file; the same for all processes that prepare the same manifest.
    clips: [n] numbers of distinct clips.
    """

    number: int
    clips: np.ndarray


def plan_units(clips: ClipList) -> list[Unit]:
    """Cut the distinct clips of a manifest into units, whatever the cache already holds.

    A unit's clips are of one file, where that holds many, and in the order in which they are best read.
    """
    places = clips.reading_places()
    inside = np.zeros((len(clips), 2), dtype=np.int64) if places is None else places
    order = np.lexsort([*reversed(clips.keys.view(">u8").T), clips.seconds, inside[:, 1], inside[:, 0]])
    of_other_file = np.diff(inside[order, 0], prepend=0) != 0
    cuts, start, seconds = [], 0, 0.0
    for place, length in enumerate(clips.seconds[order].tolist()):
        if place > start and (place - start == UNIT_CLIPS or seconds + length > UNIT_SECONDS or of_other_file[place]):
            cuts.append(place)
            start, seconds = place, 0.0
        seconds += length
    members = np.split(order, cuts) if len(order) else []
    return [Unit(_number_of(clips.keys[one]), one) for one in members]


def _number_of(keys: np.ndarray) -> int:
    return int(hashlib.sha256(keys.tobytes().hex().encode()).hexdigest()[:15], 16)


class Encoder:
    """Encodes units into the cache; see `encode_all`.

    failures: by key, the clips that cannot be used.
    num_encoded: clips that this process has encoded.

    Args:
        clips: of the manifest, which units name by number.
        load_codec: called when the first clip is to be encoded; None decodes and checks the audio, encodes nothing.
        rate: sampling rate that clips are decoded to.
        progress: called with each clip that is done.
        stop: asked before each unit and after each clip: a unit can take a codec many minutes.
    """

    def __init__(
        self,
        cache: CodeCache,
        manifest: Path,
        clips: ClipList,
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
        self._clips = clips
        self._load_codec = load_codec
        self._rate = rate
        self._progress = progress
        self._stop = stop
        self._codec: AudioCodec | None = None
        self._num_missing = 0
        self._num_done = 0

    def encode_all(self, units: Sequence[Unit], *, first: int = 0) -> None:
        """Leave no unit with a missing clip, apart from `failures`; or stop, with what is encoded in the cache.

        Units that another process is at are left to it at first, and looked at again at the end: it may have been
        killed. Processes begin at different units (`first`), to meet less often.
        """
        absent = self._cache.find(self._clips.keys) < 0
        pending = [unit for unit in [*units[first:], *units[:first]] if absent[unit.clips].any()]
        self._num_missing, self._num_done = sum(int(absent[unit.clips].sum()) for unit in pending), 0
        if not pending:
            return
        self._tell()
        locks = self._cache.locks()
        while pending and not self._stop():
            left = [unit for unit in pending if self._stop() or not self._encode_unit(unit, locks, absent)]
            if len(left) == len(pending):  # other processes are at all of them
                time.sleep(SECONDS_BETWEEN_LOOKS)
            pending = left

    def _encode_unit(self, unit: Unit, locks: NumberLocks, absent: np.ndarray) -> bool:
        """False where another process holds the unit.

        Args:
            absent: [clips] bool, those that the cache lacked at first.
        """
        with locks.hold(unit.number) as held:
            if held:
                missing = self._cache.missing(unit.number, self._clips.keys[unit.clips])
                self._encode_clips(unit.number, [self._clips[int(number)] for number in unit.clips[missing]])
                self._num_done += int(absent[unit.clips].sum())
                self._tell()
        return held

    def _encode_clips(self, unit: int, clips: Sequence[Clip]) -> None:
        usable = self._decode_all(clips)
        if self._load_codec is None or not usable:
            return
        encoded = {clip.key: _as_they_are(clip, codes) for clip, codes in usable if holds_codes(clip.path)}
        if heard := [(clip, waveform) for clip, waveform in usable if clip.key not in encoded]:
            self._codec = self._codec or self._load_codec()
            encoded |= self._encode_until_stopped(self._codec, heard)
        self._cache.add(encoded, unit=unit)
        self.num_encoded += len(encoded)

    def _decode_all(self, clips: Sequence[Clip]) -> list[tuple[Clip, np.ndarray]]:
        """The clips that can be used, with their audio, or their codes; the others are `failures`."""
        with ThreadPoolExecutor(DECODING_THREADS) as threads:
            decoded = list(threads.map(self._decode, clips))
        usable = []
        for clip, waveform in zip(clips, decoded, strict=True):
            if isinstance(waveform, BadSampleError):
                self.failures[clip.key] = waveform
            else:
                usable.append((clip, waveform))
        return usable

    def _encode_until_stopped(
        self, codec: AudioCodec, usable: Sequence[tuple[Clip, np.ndarray]]
    ) -> dict[str, EncodedClip]:
        encoded = {}
        for index, codes in codec.encode_each([waveform for _, waveform in usable]):
            clip, waveform = usable[index]
            _check_whole(codes, waveform, codec.hop_length)
            encoded[clip.key] = EncodedClip(codes, clip.seconds, clip.content)
            if self._stop():
                break
            self._tell(at_hand=len(encoded))
        return encoded

    def _tell(self, at_hand: int = 0) -> None:
        """How many clips are done, with those that are encoded and not yet in the cache."""
        if self._progress is not None:
            self._progress(min(self._num_done + at_hand, self._num_missing), self._num_missing)

    def _decode(self, clip: Clip) -> np.ndarray | BadSampleError:
        try:
            if holds_codes(clip.path):
                return load_array(Path(clip.path))
            return decode(clip.source(self._manifest), clip.segment, sampling_rate=self._rate)
        except BadSampleError as error:
            return error


def start_helpers(
    count: int,
    manifest: Path,
    cache_dir: Path,
    codec: CodecSource,
    find_clips: Callable[[], ClipList],
    devices: Sequence[str],
    *,
    apart: bool = False,
) -> list[BaseProcess]:
    """Start processes that encode clips beside the caller; they end with the work, or with the caller.

    Args:
        find_clips: gives the manifest's clips in another process.
        apart: each takes every `count + 1`-th unit, the caller from the first on, and no locks.
    """
    context = multiprocessing.get_context("spawn")
    helpers: list[BaseProcess] = []
    for number in range(count):
        place = (number + 1, count + 1)
        device = devices[(number + 1) % len(devices)]
        arguments = (manifest, cache_dir, codec, find_clips, device, place, apart, os.getpid())
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
    manifest: Path,
    cache_dir: Path,
    codec: CodecSource,
    find_clips: Callable[[], ClipList],
    device: str,
    place: tuple[int, int],
    apart: bool,
    parent: int,
) -> None:
    cache = CodeCache(cache_dir, codec.identity, alone=apart)
    cache.scan()
    clips = find_clips()
    units = plan_units(clips)
    encoder = Encoder(
        cache,
        manifest,
        clips,
        lambda: codec.load(device),
        rate=codec.sampling_rate,
        stop=lambda: os.getppid() != parent,
    )
    number, count = place
    if apart:
        encoder.encode_all(units[number::count])
    else:
        encoder.encode_all(units, first=number * len(units) // count)


def _as_they_are(clip: Clip, codes: np.ndarray) -> EncodedClip:
    return EncodedClip(torch.from_numpy(codes.astype(np.int64)), clip.seconds, clip.content)


def _check_whole(codes: torch.Tensor, waveform: np.ndarray, hop_length: int) -> None:
    """Raises UserError for a codec that leaves a clip's end out: the model would learn to stop too early."""
    needed = -(-len(waveform) // hop_length)
    if codes.shape[1] < needed:
        raise UserError(
            f"the audio codec cuts clips at their end: {codes.shape[1]} code frames for {len(waveform)} samples, "
            f"expected {needed}"
        )
