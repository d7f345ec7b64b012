"""Which share encodes which audio: told by the manifest alone, so that no process has to ask another."""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from boson_multimodal.data_types import AudioContent

from ds_higgs.data.chatml import NO_URL, parse_sample
from ds_higgs.data.containers.opening import reading_place, split_name
from ds_higgs.data.exclusion import Exclusion
from ds_higgs.data.manifest import RawEntry, problem_at, scan_manifest
from ds_higgs.data.problems import BadSampleError, Problem


@dataclass(frozen=True)
class Share:
    """One of `count` parts of a manifest's audio; `number` counts from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class AudioItem:
    """An audio item of a manifest, of which an entry tells all but its content.

    path: as the manifest has it, "" where the manifest itself holds the audio.
    number: of the entry that has it first; start, end: the entry's bytes; item: counts its raw audio items.
    """

    path: str
    number: int
    start: int
    end: int
    item: int
    offset: float
    duration: float | None


class Dealer:
    """Deals a manifest's audio out to shares.

    A file is dealt by its path, so that whatever parts of it the manifest names are read by one share. Files that hold
    many recordings are few: they are dealt in turn, as the manifest first names them.

    problems: of entries that are no samples, after `items` is through.
    """

    def __init__(self, manifest: Path, count: int, exclusion: Exclusion):
        self.problems: list[Problem] = []
        self._manifest = manifest
        self._count = count
        self._exclusion = exclusion
        self._turns: dict[str, int] = {}

    def items(self) -> Iterator[tuple[int, AudioItem]]:
        """Every audio item and the number of its share; one that several samples use comes as often."""
        self.problems.clear()
        for raw in self._exclusion.keep(scan_manifest(self._manifest)):
            entry = raw.parse()
            try:
                if entry.error is not None:
                    raise BadSampleError(entry.error)
                sample = parse_sample(entry.data)
            except BadSampleError as error:
                self.problems.append(problem_at(self._manifest, raw.number, error.message, error.expected))
                continue
            yield from self._items_of(raw, [item for message in sample.messages for item in message.content])

    def own_items(self, share: Share) -> list[AudioItem]:
        """Those of one share, each once; files beside each other come one after another."""
        return sorted(self.deal({share.number})[share.number].values(), key=_place_on_disk)

    def deal(self, numbers: Collection[int]) -> dict[int, dict[bytes, AudioItem]]:
        """For some shares, by number, their items, each once: by a digest of its name."""
        dealt: dict[int, dict[bytes, AudioItem]] = {number: {} for number in numbers}
        for number, item in self.items():
            if number in dealt:
                dealt[number].setdefault(_digest(item), item)
        return dealt

    def _items_of(self, raw: RawEntry, content: list) -> Iterator[tuple[int, AudioItem]]:
        raw_items = 0
        for one in content:
            if not isinstance(one, AudioContent):
                continue
            path = "" if one.audio_url in NO_URL else one.audio_url
            place = (raw.number, raw.start, raw.end, 0 if path else raw_items)
            raw_items += not path
            yield self._turn(path or one.raw_audio or ""), AudioItem(path, *place, one.offset or 0.0, one.duration)

    def _turn(self, named: str) -> int:
        inside = split_name(named)
        if inside is not None:
            return self._turns.setdefault(inside[0], len(self._turns)) % self._count + 1
        return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest(), "little") % self._count + 1


def _digest(item: AudioItem) -> bytes:
    """Equal for equal audio, as far as its name tells."""
    named = [item.path] if item.path else [item.start, item.item]
    return hashlib.blake2b(json.dumps([*named, item.offset, item.duration]).encode(), digest_size=16).digest()


def _place_on_disk(item: AudioItem) -> tuple[str, int, str, int, float]:
    return *reading_place(item.path), item.path, item.start, item.offset
