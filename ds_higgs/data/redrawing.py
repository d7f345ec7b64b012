"""References drawn anew: another clip of the same speaker in place of a sample's own, in every epoch.

What may be drawn is the same in all epochs and on all ranks; what is drawn is a function of seed, epoch and sample.
Clips of a speaker are ordered by the positions that they take: those that fit a sample are its first ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_higgs.data.audio_uses import AudioUses, find_audio_uses
from ds_higgs.data.conditions import PromptParts
from ds_higgs.data.sample_table import SampleTable
from ds_higgs.errors import UserError
from ds_higgs.layout import WHISPER_SECONDS, AudioLayout

KEEPS_ITS_OWN = -1


class Exchange(NamedTuple):
    """What takes the place of a sample's reference.

    place: of the reference among the sample's clips; said: the span of its tokens that says what the reference says.
    use: the clip that comes, by its number among the clips of all samples; row, words: where what it says stands.
    """

    place: int
    said: slice
    use: int
    row: int
    words: slice

    def apply(self, tokens: np.ndarray, supervised: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A sample's tokens and supervision with `words` in place of what was said."""
        unlearned = np.zeros(len(words), dtype=np.bool_)
        return _exchanged(tokens, self.said, words), _exchanged(supervised, self.said, unlearned)


class DrawnReferences(NamedTuple):
    """An epoch's references.

    uses: [samples] int32, the clip that each sample hears, among the clips of all samples; or KEEPS_ITS_OWN.
    lengths: [samples] int32, positions that each then takes in the model.
    """

    uses: np.ndarray
    lengths: np.ndarray


class References:
    """The references of samples in one form, and what may stand in their place.

    rows: of the samples whose reference can be redrawn; num_speakers: how many these have.
    longest: [samples] int32, the most positions that each takes with whatever is drawn.

    Args:
        frames: [uses] code frames of each clip.
        lengths: [samples] positions that each takes as it is.
        max_tokens: the most positions that a sample may take.
        served: in the form that servers send rather than in the samples' own.
    """

    def __init__(
        self,
        samples: SampleTable,
        frames: np.ndarray,
        lengths: np.ndarray,
        *,
        parts: PromptParts,
        max_tokens: int,
        served: bool = False,
    ):
        self._uses = find_audio_uses(samples, parts, served=served)
        self._lengths = np.asarray(lengths, dtype=np.int32)
        self._own = np.full(len(samples), KEEPS_ITS_OWN, dtype=np.int32)
        own = _only_references(self._uses, len(samples))
        self._own[self._uses.row[own]] = own
        speakers = samples.speakers()
        clips = _Clips(self._uses, speakers[self._uses.row], samples.recordings())
        self._choices = [
            _find_choice(clips, own, sizes, self._lengths, max_tokens)
            for own, sizes in _kinds(self._uses, own, samples.seconds(), frames, parts.layout)
        ]
        self.longest = self._lengths.copy()
        for choice in self._choices:
            self.longest[choice.rows] = np.maximum(self._lengths[choice.rows], choice.longest())
        self.rows = np.sort(np.concatenate([np.zeros(0, np.int64), *(choice.rows for choice in self._choices)]))
        self.num_speakers = len(np.unique(speakers[self.rows]))

    @property
    def num_samples(self) -> int:
        """Samples that have a reference."""
        return len(np.unique(self._uses.row[self._uses.is_reference]))

    def draw(self, *, seed: int, epoch: int) -> DrawnReferences:
        """What every sample's reference is in an epoch, from seed and epoch alone."""
        # A stream of its own, beside those of the epoch's plan, of its forms and of what is left out.
        chances = np.random.default_rng([seed, epoch, 3]).random(len(self._lengths))
        uses, lengths = np.full(len(self._lengths), KEEPS_ITS_OWN, dtype=np.int32), self._lengths.copy()
        for choice in self._choices:
            uses[choice.rows], lengths[choice.rows] = choice.draw(chances[choice.rows])
        return DrawnReferences(uses, lengths)

    def exchange(self, row: int, use: int) -> Exchange:
        """The clip `use`, as it was drawn, in place of a sample's own reference."""
        uses, own = self._uses, int(self._own[row])
        said, words = (slice(int(uses.text_start[one]), int(uses.text_stop[one])) for one in (own, use))
        if said.start == said.stop:  # the prompt does not say what is heard, and is to stay so
            words = slice(0, 0)
        return Exchange(int(uses.place[own]), said, use, int(uses.row[use]), words)


def check_speakers(manifest: str, samples: SampleTable, parts: PromptParts) -> None:
    """Raises UserError where samples have references, and none of them names its speaker."""
    if len(samples) > samples.table["speaker"].null_count or not find_audio_uses(samples, parts).is_reference.any():
        return
    raise UserError(
        f"{manifest}: data.reference is redraw, and none of {len(samples)} samples names its speaker; expected "
        "`speaker` in the manifest's samples, or as_is (data.reference, or `reference` of this source)"
    )


@dataclass(frozen=True)
class _Clips:
    """The uses of all clips, with the speaker of each, -1 where nobody knows, and the number of its recording."""

    uses: AudioUses
    speaker: np.ndarray
    recording: np.ndarray


@dataclass(frozen=True)
class _Choice:
    """Samples whose references are of one kind, and the clips that may stand in their place.

    rows: [n] of samples; rest: [n] positions that each takes without its reference.
    first, count: [n] the clips that fit, a stretch of `clips`; forbidden: of these, by `hidden`, how many may not be.
    clips: uses, by speaker and then by size; sizes: positions that each takes, with what it says.
    hidden: level by level, the places in `rows`, and the numbers among the clips that fit, of those that may not be:
        a sample's first one in all samples that have one, then the second ones, numbers rising.
    """

    rows: np.ndarray
    rest: np.ndarray
    first: np.ndarray
    count: np.ndarray
    forbidden: np.ndarray
    clips: np.ndarray
    sizes: np.ndarray
    hidden: Sequence[tuple[np.ndarray, np.ndarray]]

    def draw(self, chances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The use drawn for each sample, all equally likely, and the positions that the sample then takes.

        Args:
            chances: [n] in [0, 1).
        """
        number = (chances * (self.count - self.forbidden)).astype(np.int64)
        for samples, hidden in self.hidden:
            number[samples] += number[samples] >= hidden
        drawn = self.first + number
        return self.clips[drawn], self.rest + self.sizes[drawn]

    def longest(self) -> np.ndarray:
        return self.rest + self.sizes[self.first + self.count - 1]


def _only_references(uses: AudioUses, num_samples: int) -> np.ndarray:
    """The reference of each sample that has one alone, which can change."""
    count = np.bincount(uses.row[uses.is_reference], minlength=num_samples)
    return np.flatnonzero(uses.is_reference & uses.is_single & uses.can_change & (count[uses.row] == 1))


def _kinds(
    uses: AudioUses, own: np.ndarray, seconds: np.ndarray, frames: np.ndarray, layout: AudioLayout
) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """References that ask the same of a clip, and the positions that each clip takes in their place, 0 for none.

    They ask the same if they stand in messages of the same role, and if what they say is said or not.
    """
    usable = uses.is_single & (uses.is_target | uses.is_reference)
    kinds = []
    for is_input in (False, True):
        token = layout.audio_in_token if is_input else layout.audio_out_token
        audio = layout.count_positions(np.full(len(uses), token), frames.astype(np.int64), seconds)
        fits = usable & (seconds <= WHISPER_SECONDS) if layout.whisper and is_input else usable
        for with_words in (False, True):
            words = uses.text_length if with_words else 0
            chosen = (uses.is_input[own] == is_input) & ((uses.text_length[own] > 0) == with_words)
            can_stand = fits & (uses.text_length > 0) if with_words else fits
            kinds.append((own[chosen], np.where(can_stand, audio + words, 0)))
    return kinds


def _find_choice(clips: _Clips, own: np.ndarray, sizes: np.ndarray, lengths: np.ndarray, max_tokens: int) -> _Choice:
    """What may stand in place of the references `own`, where there is something else.

    Args:
        sizes: [uses], of `_kinds`.
    """
    own = own[clips.speaker[own] >= 0]
    listed = _list_distinct(clips, np.flatnonzero((sizes > 0) & (clips.speaker >= 0)) if len(own) else own, sizes)
    speaker, rows = clips.speaker[own].astype(np.int64), clips.uses.row[own]
    rest = lengths[rows] - sizes[own]
    order = _pairs(clips.speaker[listed], sizes[listed])
    first = np.searchsorted(order, _pairs(speaker, 0))
    count = np.searchsorted(order, _pairs(speaker, max_tokens - rest), side="right") - first

    number_of = np.full(len(lengths), -1)
    number_of[rows] = np.arange(len(own))
    targets = np.flatnonzero(clips.uses.is_target & (number_of[clips.uses.row] >= 0))
    of_target = number_of[clips.uses.row[targets]]
    hidden = _find(clips, listed, targets) - first[of_target]
    is_hidden = (hidden >= 0) & (hidden < count[of_target])
    pairs = np.unique(_pairs(of_target[is_hidden], hidden[is_hidden]))
    forbidden = np.bincount(pairs >> 32, minlength=len(own))

    itself = _find(clips, listed, own) - first
    is_choice = (itself >= 0) & (itself < count) & ~np.isin(_pairs(np.arange(len(own)), itself), pairs)
    kept = count - forbidden - is_choice > 0
    return _Choice(
        rows=rows[kept],
        rest=rest[kept].astype(np.int32),
        first=first[kept].astype(np.int32),
        count=count[kept].astype(np.int32),
        forbidden=forbidden[kept].astype(np.int32),
        clips=listed.astype(np.int32),
        sizes=sizes[listed].astype(np.int32),
        hidden=_levels(pairs, kept),
    )


def _list_distinct(clips: _Clips, usable: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """One use of each recording of each speaker, by speaker and then by size."""
    order = usable[np.lexsort((clips.recording[usable], clips.speaker[usable]))]
    names = _pairs(clips.speaker[order], clips.recording[order])
    distinct = order[np.append(True, names[1:] != names[:-1])[: len(order)]]
    return distinct[np.lexsort((sizes[distinct], clips.speaker[distinct]))]


def _find(clips: _Clips, listed: np.ndarray, uses: np.ndarray) -> np.ndarray:
    """Where the recordings of some uses stand among those that are listed, -1 where they do not."""
    names = _pairs(clips.speaker[listed], clips.recording[listed])
    order = np.argsort(names)
    wanted = _pairs(clips.speaker[uses], clips.recording[uses])
    places = np.searchsorted(names, wanted, sorter=order)
    found = np.full(len(uses), -1)
    inside = places < len(names)
    found[inside] = order[places[inside]]
    return np.where(names[found] == wanted, found, -1) if len(names) else found


def _levels(pairs: np.ndarray, kept: np.ndarray) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """See `_Choice.hidden`.

    Args:
        pairs: sorted, of a sample and a number; kept: [n] bool, samples that stay.
    """
    renumbered = (np.cumsum(kept) - 1).astype(np.int32)
    pairs = pairs[kept[pairs >> 32]] if len(pairs) else pairs
    sample, number = renumbered[pairs >> 32], (pairs & 0xFFFFFFFF).astype(np.int32)
    level = np.arange(len(pairs)) - np.searchsorted(sample, sample)
    return [(sample[level == one], number[level == one]) for one in range(int(level.max(initial=-1)) + 1)]


def _pairs(first: np.ndarray, second: np.ndarray | int) -> np.ndarray:
    """Two numbers as one, ordered by the first and then by the second."""
    return (first.astype(np.int64) << 32) + second


def _exchanged(values: np.ndarray, span: slice, new: np.ndarray) -> np.ndarray:
    return np.concatenate([values[: span.start], new, values[span.stop :]])
