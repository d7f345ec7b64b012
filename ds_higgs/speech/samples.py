"""Speaks a fixed set of prompts, measures what comes out and saves it as WAV files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
from peft import PeftModel

from ds_higgs.batch import FixedPrompt
from ds_higgs.model.generation import Sampling, evaluation_mode, generate_codes, max_frames_for
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.lora import unwrap
from ds_higgs.run_folder import REFERENCES, TARGETS
from ds_higgs.speech.accuracy import measure_accuracy
from ds_higgs.speech.endings import judge_ending
from ds_higgs.speech.measures import measure_speech


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

    def speak(self, model: PeftModel | HiggsAudioModel, item: FixedPrompt) -> Spoken:
        """Generate, decode and measure one prompt."""
        generated = generate_codes(
            unwrap(model),
            item.inputs,
            max_frames=self.max_frames,
            sampling=self.sampling,
            seed=self.seed + item.number,
        )
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

    def save_originals(self, folder: Path, items: Sequence[FixedPrompt]) -> None:
        """Write target and reference of every prompt, as the codec gives them back; what is there stays."""
        for item in items:
            originals = {TARGETS: item.target_codes, REFERENCES: item.reference_codes}
            for name, codes in originals.items():
                file = wav_path(folder / name, item.number)
                if codes is not None and not file.exists():
                    save_wav(file, self.decode(codes), self.codec)


def speak_all(
    model: PeftModel | HiggsAudioModel,
    items: Iterable[FixedPrompt],
    synthesizer: Synthesizer,
    folder: Path,
    *,
    judge: Callable[[FixedPrompt, np.ndarray], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Speak all prompts to `folder`/NNN.wav; a row of measures for each, with the file's path.

    Args:
        judge: further measures of a prompt's waveform.
    """
    rows = []
    for item in items:
        spoken = synthesizer.speak(model, item)
        file = wav_path(folder, item.number)
        save_wav(file, spoken.waveform, synthesizer.codec)
        rows.append({**spoken.row, "file": str(file), **(judge(item, spoken.waveform) if judge else {})})
    return rows


def wav_path(folder: Path, number: int) -> Path:
    """The file of a prompt's number in a folder of samples."""
    return folder / f"{number:03d}.wav"


def save_wav(file: Path, waveform: np.ndarray, codec: Decoder) -> None:
    """Write 16-bit mono at the codec's rate; louder than full scale is clipped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.clip(waveform, -1.0, 1.0), codec.sampling_rate, subtype="PCM_16")
