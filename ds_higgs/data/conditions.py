"""What a prompt may lack: reference, what it says, system message, left out of some samples, drawn anew every epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_higgs.data.prompt_forms import REQUEST
from ds_higgs.layout import AudioLayout

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class DropRates:
    """How often each is left out; a reference goes together with what it says."""

    reference: float = 0.0
    reference_text: float = 0.0
    system: float = 0.0

    def any(self) -> bool:
        """Whether anything is ever left out."""
        return self.reference > 0 or self.reference_text > 0 or self.system > 0


NO_DROPS = DropRates()


class Dropped(NamedTuple):
    """What one sample lacks in an epoch."""

    reference: bool
    reference_text: bool
    system: bool


NOTHING = Dropped(reference=False, reference_text=False, system=False)


class _Turn(NamedTuple):
    """One message in a sample's tokens: from `start` to `stop`, what it says from `content` to its end token."""

    role: str
    start: int
    content: int
    stop: int


@dataclass(frozen=True)
class PromptParts:
    """Finds the parts of a sample in its tokens, as boson's prepare_chatml_sample lays them out.

    prefixes: by role, the tokens that a message begins with.
    phrase: the tokens of a request's phrase; see `prompt_forms`.
    """

    layout: AudioLayout
    prefixes: dict[str, tuple[int, ...]]
    phrase: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, layout: AudioLayout) -> "PromptParts":
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        prefixes = {role: encode(f"<|start_header_id|>{role}<|end_header_id|>\n\n") for role in ROLES}
        return cls(layout, prefixes, encode(REQUEST.strip()))

    def keep(self, tokens: np.ndarray, supervised: np.ndarray, dropped: Dropped) -> np.ndarray:
        """Which tokens stay, [num_tokens] bool. What is learned always does.

        A reference is audio before a text in a user message, or an assistant's audio that is not learned; what it says
        is the text before it: in the same message, or the user message before the assistant's.

        Args:
            tokens: [num_tokens]; supervised: [num_tokens] bool.
        """
        kept = np.ones(len(tokens), dtype=np.bool_)
        turns = list(self._turns(tokens))
        if dropped.system and len(turns) > 1 and turns[0].role == "system":
            kept[turns[0].start : turns[0].stop] = False
        if not (dropped.reference or dropped.reference_text):
            return kept
        for number, turn in enumerate(turns):
            audio = turn.content + np.flatnonzero(self._is_audio(tokens[turn.content : turn.stop]))
            if not len(audio):
                continue
            end = int(audio[-1]) + 2  # behind the token that closes the audio
            if turn.role == "user" and end < turn.stop - 1:
                self._leave_out(kept, turn.content, end, audio, whole=dropped.reference)
            elif turn.role == "assistant" and not supervised[audio].any():
                first = self._asked_before(turns, number, tokens)
                if dropped.reference:
                    kept[first : turn.stop] = False
                else:
                    kept[first : turn.start] = False
                    self._leave_out(kept, turn.content, end, audio, whole=False)
        return kept

    def _turns(self, tokens: np.ndarray) -> Iterator[_Turn]:
        header = self.prefixes["user"][0]
        starts = np.flatnonzero(tokens == header).tolist()
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            for role, prefix in self.prefixes.items():
                if tuple(tokens[start : start + len(prefix)].tolist()) == prefix:
                    yield _Turn(role, start, start + len(prefix), stop)

    def _is_audio(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens == self.layout.audio_in_token) | (tokens == self.layout.audio_out_token)

    def _asked_before(self, turns: list[_Turn], number: int, tokens: np.ndarray) -> int:
        """Where a reference turn begins with the user message, of text alone, that says what is spoken in it."""
        if number == 0:
            return turns[number].start
        before = turns[number - 1]
        is_text = before.role == "user" and not self._is_audio(tokens[before.start : before.stop]).any()
        return before.start if is_text else turns[number].start

    @staticmethod
    def _leave_out(kept: np.ndarray, start: int, stop: int, audio: np.ndarray, *, whole: bool) -> None:
        kept[start:stop] = False
        if not whole:
            for place in audio.tolist():
                kept[place - 1 : place + 2] = True


def draw_dropped(rates: DropRates, num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """What each sample lacks in an epoch, from seed and epoch alone: [num_samples, 3] bool, in `Dropped`'s order."""
    # A stream of its own, beside those of the epoch's plan and of its forms.
    chances = np.random.default_rng([seed, epoch, 2]).random((num_samples, 3))
    return chances < np.asarray([rates.reference, rates.reference_text, rates.system])
