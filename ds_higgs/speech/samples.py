"""Speaks a fixed set of prompts, measures what comes out and saves it as WAV files."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
from peft import PeftModel

from ds_higgs.batch import FixedPrompt
from ds_higgs.model.batched_generation import generate_together
from ds_higgs.model.generation import GeneratedCodes, Sampling, evaluation_mode, max_frames_for
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.lora import unwrap
from ds_higgs.run_folder import REFERENCES, TARGETS
from ds_higgs.speech.accuracy import measure_accuracy
from ds_higgs.speech.endings import judge_ending
from ds_higgs.speech.judging import NOBODY, Judges
from ds_higgs.speech.measures import measure_speech

# Prompts that are spoken in one generation: of the released model, 0.15 GB each for 20 s.
AT_ONCE = 8


@dataclass(frozen=True)
class Spoken:
    """What a model said to a prompt. waveform: mono float32 at the codec's rate; row: names and measures."""

    waveform: np.ndarray
    row: dict[str, Any]


class Decoder(Protocol):
    """What speaking needs of a codec; `AudioCodec` has it."""

    sampling_rate: int
    hop_length: int

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """[codebooks, frames] codes -> mono float32 samples at `sampling_rate`."""
        ...


class Synthesizer:
    """Speaks prompts with the codec and the sampling of one evaluation, the same way for every model.

    Args:
        seed: prompt number n is spoken with seed + n.
        max_seconds: longest speech.
    """

    def __init__(self, codec: Decoder, *, sampling: Sampling, seed: int, max_seconds: float):
        self.codec = codec
        self.sampling = sampling
        self.seed = seed
        self.max_frames = max_frames_for(max_seconds, sampling_rate=codec.sampling_rate, hop_length=codec.hop_length)

    def speak(
        self,
        model: PeftModel | HiggsAudioModel,
        items: Sequence[FixedPrompt],
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[GeneratedCodes]:
        """The codes of all prompts, from one generation; unfinished where `stop`, asked at every frame, says so."""
        return generate_together(
            unwrap(model),
            [item.inputs for item in items],
            max_frames=self.max_frames,
            sampling=self.sampling,
            seeds=[self.seed + item.number for item in items],
            stop=stop,
        )

    def measure(self, model: PeftModel | HiggsAudioModel, item: FixedPrompt, generated: GeneratedCodes) -> Spoken:
        """Decode and measure what was said to one prompt."""
        waveform = self.decode(generated.codes)
        measures = measure_speech(waveform, self.decode(item.target_codes), sampling_rate=self.codec.sampling_rate)
        with evaluation_mode(unwrap(model)):
            accuracy = measure_accuracy(model, item.batch)
        row = {
            "number": item.number,
            "sample_id": item.sample_id,
            "stopped_by": generated.stopped_by,
            **asdict(judge_ending(generated.codes, item.target_codes, stopped_by=generated.stopped_by)),
            **asdict(measures),
            "code_accuracy": accuracy.overall(),
            "code_accuracy_per_codebook": accuracy.per_codebook(),
        }
        return Spoken(waveform, row)

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """[codebooks, frames] -> mono float32; nothing for no frames."""
        return self.codec.decode(codes) if codes.shape[1] else np.zeros(0, dtype=np.float32)

    def ask(self, judges: Judges, item: FixedPrompt, waveform: np.ndarray) -> dict[str, Any]:
        """What the judges make of what was said to a prompt."""
        return judges.judge(item, waveform, decode=self.decode, sampling_rate=self.codec.sampling_rate)

    def save_originals(self, folder: Path, items: Sequence[FixedPrompt]) -> None:
        """Write target and reference of every prompt, as the codec gives them back."""
        for item in items:
            originals = {TARGETS: item.target_codes, REFERENCES: item.reference_codes}
            for name, codes in originals.items():
                if codes is not None:
                    save_wav(wav_path(folder / name, item.number), self.decode(codes), self.codec)


def speak_all(
    model: PeftModel | HiggsAudioModel,
    items: Sequence[FixedPrompt],
    synthesizer: Synthesizer,
    folder: Path,
    *,
    judges: Judges = NOBODY,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Speak all prompts to `folder`/NNN.wav, several at once; a row of measures for each, with the file's path.

    Args:
        judges: those who listen to it too.
        stop: asked at every frame whether to leave the rest; what is half said is left too.
    """
    rows: list[dict[str, Any]] = []
    for start in range(0, len(items), AT_ONCE):
        together = items[start : start + AT_ONCE]
        for item, codes in zip(together, synthesizer.speak(model, together, stop=stop), strict=True):
            if stop():
                return rows
            spoken = synthesizer.measure(model, item, codes)
            file = wav_path(folder, item.number)
            save_wav(file, spoken.waveform, synthesizer.codec)
            rows.append({**spoken.row, "file": str(file), **synthesizer.ask(judges, item, spoken.waveform)})
    return rows


def wav_path(folder: Path, number: int) -> Path:
    """The file of a prompt's number in a folder of samples."""
    return folder / f"{number:03d}.wav"


def save_wav(file: Path, waveform: np.ndarray, codec: Decoder) -> None:
    """Write 16-bit mono at the codec's rate; louder than full scale is clipped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.clip(waveform, -1.0, 1.0), codec.sampling_rate, subtype="PCM_16")
