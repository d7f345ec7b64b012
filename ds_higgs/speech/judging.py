"""What judges make of spoken prompts: errors against the text, likeness of the voice; and of many together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ds_higgs.batch import FixedPrompt
from ds_higgs.speech.judges import SpeakerJudge, Transcriber
from ds_higgs.speech.transcripts import ErrorCount, count_character_errors, count_word_errors, total_errors

# Counts of a spoken prompt's row, and what they are called as rates.
ERROR_RATES = {"word_errors": "word_error_rate", "character_errors": "character_error_rate"}


@dataclass(frozen=True)
class Judges:
    """The optional models that listen."""

    transcriber: Transcriber | None = None
    speaker: SpeakerJudge | None = None

    @classmethod
    def of(
        cls,
        asr: str | None,
        speaker_model: str | None,
        *,
        language: str | None,
        device: torch.device | str = "cpu",
    ) -> "Judges":
        """Those of the models that are named, by folder or hub id; nothing is loaded yet."""
        return cls(
            None if asr is None else Transcriber(asr, language=language, device=device),
            None if speaker_model is None else SpeakerJudge(speaker_model, device=device),
        )

    @property
    def present(self) -> tuple[Transcriber | SpeakerJudge, ...]:
        """Those that there are."""
        return tuple(judge for judge in (self.transcriber, self.speaker) if judge is not None)

    def load(self) -> None:
        """Load them now, on the device of each.

        Raises:
            UserError: one cannot be loaded, or knows no such language.
        """
        with _random_state_kept():  # weights are drawn before they are read
            for judge in self.present:
                judge.load()

    @property
    def num_bytes(self) -> int:
        """Of their weights together."""
        return sum(judge.num_bytes for judge in self.present)

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Have them on `device` for a while, and on the CPU afterwards."""
        for judge in self.present:
            judge.move_to(device)
        try:
            yield
        finally:
            for judge in self.present:
                judge.move_to("cpu")

    def judge(
        self,
        item: FixedPrompt,
        waveform: np.ndarray,
        *,
        decode: Callable[[torch.Tensor], np.ndarray],
        sampling_rate: int,
    ) -> dict[str, Any]:
        """What goes into the row of a prompt, whose text is known, and to which `waveform` was said.

        Args:
            decode: the codes of the voice to compare with -> mono float32.
        """
        with _random_state_kept():  # WavLM draws for its layer dropout, whether it trains or not
            return self._hear(item, waveform, sampling_rate) | self._compare(item, waveform, decode, sampling_rate)

    def _hear(self, item: FixedPrompt, waveform: np.ndarray, sampling_rate: int) -> dict[str, Any]:
        if self.transcriber is None:
            return {}
        assert item.text is not None, "prompts that are transcribed have their texts"
        heard = self.transcriber.transcribe(waveform, sampling_rate=sampling_rate) if len(waveform) else ""
        return {
            "text": item.text,
            "heard": heard,
            "word_errors": vars(count_word_errors(item.text, heard)),
            "character_errors": vars(count_character_errors(item.text, heard)),
        }

    def _compare(
        self,
        item: FixedPrompt,
        waveform: np.ndarray,
        decode: Callable[[torch.Tensor], np.ndarray],
        sampling_rate: int,
    ) -> dict[str, Any]:
        if self.speaker is None:
            return {}
        if not len(waveform):  # nobody's voice: left out, the other prompts would speak for it
            return {"speaker_similarity": 0.0}
        original = decode(item.target_codes if item.reference_codes is None else item.reference_codes)
        return {"speaker_similarity": self.speaker.similarity(waveform, original, sampling_rate=sampling_rate)}


NOBODY = Judges()


def _random_state_kept() -> AbstractContextManager[None]:
    """Training and speaking draw from the CPU's random state as if there were no judges."""
    return torch.random.fork_rng(devices=[])


def error_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Errors over all words, and characters, of the rows together; nothing where nobody transcribed."""
    counted = {errors: [row[errors] for row in rows if errors in row] for errors in ERROR_RATES}
    return {
        ERROR_RATES[errors]: total_errors(ErrorCount(**one) for one in found).rate
        for errors, found in counted.items()
        if found
    }
