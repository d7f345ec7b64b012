"""Optional judges that the user names: a speech recogniser and a speaker model of transformers.

Both are loaded at first use. Nothing is executed from their repositories.
"""

from functools import cached_property
from typing import Any

import librosa
import numpy as np
import torch

from ds_higgs.errors import UserError


class Transcriber:
    """Writes down speech with a transformers speech recogniser (Whisper, wav2vec 2.0 and the like).

    Args:
        model: folder or hub id.
        language: for multilingual Whisper models, such as "arabic"; None lets the model guess.
    """

    def __init__(self, model: str, *, language: str | None = None, device: str | torch.device = "cpu"):
        self.model = model
        self.language = language
        self.device = device

    @cached_property
    def _pipeline(self) -> Any:
        from transformers import pipeline

        try:
            return pipeline("automatic-speech-recognition", model=self.model, device=self.device)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.model}: cannot be loaded as a speech recogniser: {error}") from error

    def transcribe(self, waveform: np.ndarray, *, sampling_rate: int) -> str:
        """The words of a mono float32 waveform."""
        rate = self._pipeline.feature_extractor.sampling_rate
        audio = {"raw": _resample(waveform, sampling_rate, rate), "sampling_rate": rate}
        options = {"language": self.language} if self.language else None
        return self._pipeline(audio, generate_kwargs=options)["text"]


class SpeakerJudge:
    """Compares voices with a transformers x-vector model (WavLM, wav2vec 2.0, UniSpeech).

    Args:
        model: folder or hub id, such as microsoft/wavlm-base-plus-sv.
    """

    def __init__(self, model: str, *, device: str | torch.device = "cpu"):
        self.model = model
        self.device = device

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        try:
            extractor = AutoFeatureExtractor.from_pretrained(self.model)
            return extractor, AutoModelForAudioXVector.from_pretrained(self.model).eval().to(self.device)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.model}: cannot be loaded as a speaker model: {error}") from error

    @torch.no_grad()
    def embed(self, waveform: np.ndarray, *, sampling_rate: int) -> torch.Tensor:
        """The voice of a mono float32 waveform: [embedding] of length 1."""
        extractor, model = self._parts
        rate = extractor.sampling_rate
        inputs = extractor(_resample(waveform, sampling_rate, rate), sampling_rate=rate, return_tensors="pt")
        return torch.nn.functional.normalize(model(**inputs.to(self.device)).embeddings[0].float(), dim=0).cpu()

    def similarity(self, first: np.ndarray, second: np.ndarray, *, sampling_rate: int) -> float:
        """Cosine of the two voices, -1 to 1."""
        voices = [self.embed(waveform, sampling_rate=sampling_rate) for waveform in (first, second)]
        return float(voices[0] @ voices[1])


def _resample(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    return librosa.resample(waveform, orig_sr=from_rate, target_sr=to_rate)
