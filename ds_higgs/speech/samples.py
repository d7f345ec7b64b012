"""Speaks a fixed set of prompts, measures what comes out and saves it as WAV files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from peft import PeftModel

from ds_higgs.batch import Batch
from ds_higgs.data.codec.source import AudioCodec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.model.generation import Sampling, evaluation_mode, generate_codes, max_frames_for
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.lora import unwrap
from ds_higgs.run_folder import REFERENCES, TARGETS
from ds_higgs.speech.accuracy import measure_accuracy
from ds_higgs.speech.measures import measure_speech
from ds_higgs.speech.prompts import Prompt, collate_prompt, cut_prompt


@dataclass(frozen=True)
class FixedPrompt:
    """One prompt that is spoken again and again.

    number: its place among the prompts of the run; it names the WAV files.
    batch: the whole sample, for teacher-forced accuracy.
    """

    number: int
    sample_id: str
    prompt: Prompt
    batch: Batch


@dataclass(frozen=True)
class Spoken:
    """What a model said to a prompt. waveform: mono float32 at the codec's rate; row: names and measures."""

    waveform: np.ndarray
    row: dict[str, Any]


def choose_prompts(dataset: HiggsDataset, collator: BatchCollator, *, count: int | None) -> list[FixedPrompt]:
    """Up to `count` samples (None: all) that have audio to learn, spread evenly over the data set; always the same."""
    with_audio = [index for index in range(len(dataset)) if dataset.count_targets(index)[1] > 0]
    count = len(with_audio) if count is None else min(count, len(with_audio))
    places = np.unique(np.linspace(0, len(with_audio) - 1, count).round().astype(int))
    return [_build_prompt(dataset, collator, with_audio[place], number) for number, place in enumerate(places)]


def _build_prompt(dataset: HiggsDataset, collator: BatchCollator, index: int, number: int) -> FixedPrompt:
    sample, sample_id = dataset[index], dataset.sample_id(index)
    prompt = cut_prompt(sample, collator.layout)
    assert prompt is not None, "only samples with audio to learn are chosen"
    return FixedPrompt(number, sample_id, prompt, batch=collator([sample], [sample_id]))


class Speaker:
    """Speaks prompts with the codec and the sampling of one evaluation, the same way for every model.

    Args:
        seed: prompt number n is spoken with seed + n.
        max_seconds: longest speech.
    """

    def __init__(
        self, codec: AudioCodec, collator: BatchCollator, *, sampling: Sampling, seed: int, max_seconds: float
    ):
        self.codec = codec
        self.collator = collator
        self.sampling = sampling
        self.seed = seed
        self.max_frames = max_frames_for(max_seconds, sampling_rate=codec.sampling_rate, hop_length=codec.hop_length)

    def speak(self, model: PeftModel | HiggsAudioModel, item: FixedPrompt) -> Spoken:
        """Generate, decode and measure one prompt."""
        generated = generate_codes(
            unwrap(model),
            collate_prompt(item.prompt, self.collator),
            max_frames=self.max_frames,
            sampling=self.sampling,
            seed=self.seed + item.number,
        )
        waveform = self.decode(generated.codes)
        measures = measure_speech(
            waveform, self.decode(item.prompt.target_codes), sampling_rate=self.codec.sampling_rate
        )
        with evaluation_mode(unwrap(model)):
            accuracy = measure_accuracy(model, item.batch)
        row = {
            "number": item.number,
            "sample_id": item.sample_id,
            "stopped_by": generated.stopped_by,
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
            originals = {TARGETS: item.prompt.target_codes, REFERENCES: item.prompt.reference_codes}
            for name, codes in originals.items():
                file = wav_path(folder / name, item.number)
                if codes is not None and not file.exists():
                    save_wav(file, self.decode(codes), self.codec)


def speak_all(
    model: PeftModel | HiggsAudioModel,
    items: Iterable[FixedPrompt],
    speaker: Speaker,
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
        spoken = speaker.speak(model, item)
        file = wav_path(folder, item.number)
        save_wav(file, spoken.waveform, speaker.codec)
        rows.append({**spoken.row, "file": str(file), **(judge(item, spoken.waveform) if judge else {})})
    return rows


def wav_path(folder: Path, number: int) -> Path:
    return folder / f"{number:03d}.wav"


def save_wav(file: Path, waveform: np.ndarray, codec: AudioCodec) -> None:
    """Write 16-bit mono at the codec's rate; louder than full scale is clipped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.clip(waveform, -1.0, 1.0), codec.sampling_rate, subtype="PCM_16")
