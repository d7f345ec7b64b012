"""Optional judges that the user names: a speech recogniser and a speaker model of transformers.

Both are loaded at first use, or by `load`. Nothing is executed from their repositories.
"""

from functools import cached_property
from typing import Any

import librosa
import numpy as np
import torch

from ds_higgs.errors import UserError

# What speaker models need of a voice (x-vectors look 0.3 s around), and convolutions of a recogniser at all.
LEAST_SECONDS = 0.5
WHISPER_SECONDS = 30.0  # that Whisper hears at once; more only with time stamps


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

    def load(self) -> None:
        """Load the model now. Raises UserError where it is missing, is no recogniser or knows no such language."""
        self._pipeline  # noqa: B018

    def move_to(self, device: str | torch.device) -> None:
        """Have the model on another device from now on."""
        self.device = device
        self._pipeline.model.to(device)
        self._pipeline.device = torch.device(device)

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return _weights_bytes(self._pipeline.model)

    @cached_property
    def _pipeline(self) -> Any:
        from transformers import pipeline

        try:
            found = pipeline("automatic-speech-recognition", model=self.model, device=self.device)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.model}: cannot be loaded as a speech recogniser: {error}") from error
        if self.language is not None:
            _check_language(self.model, found.model, self.language)
        return found

    def transcribe(self, waveform: np.ndarray, *, sampling_rate: int) -> str:
        """The words of a mono float32 waveform."""
        rate = self._pipeline.feature_extractor.sampling_rate
        speech = _resample(waveform, sampling_rate, rate)
        speech = np.pad(speech, (0, max(0, round(LEAST_SECONDS * rate) - len(speech))))
        needs_stamps = self._pipeline.type == "seq2seq_whisper" and len(speech) > WHISPER_SECONDS * rate
        audio = {"raw": speech, "sampling_rate": rate}
        options = {"language": self.language} if self.language else None
        return self._pipeline(audio, generate_kwargs=options, return_timestamps=needs_stamps or None)["text"]


class SpeakerJudge:
    """Compares voices with a transformers x-vector model (WavLM, wav2vec 2.0, UniSpeech).

    Args:
        model: folder or hub id, such as microsoft/wavlm-base-plus-sv.
    """

    def __init__(self, model: str, *, device: str | torch.device = "cpu"):
        self.model = model
        self.device = device

    def load(self) -> None:
        """Load the model now. Raises UserError where it is missing or is no speaker model."""
        self._parts  # noqa: B018

    def move_to(self, device: str | torch.device) -> None:
        """Have the model on another device from now on."""
        self.device = device
        self._parts[1].to(device)

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return _weights_bytes(self._parts[1])

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
        """The voice of a mono float32 waveform of at least one sample: [embedding] of length 1.

        Shorter than LEAST_SECONDS it is heard again and again.
        """
        extractor, model = self._parts
        rate = extractor.sampling_rate
        speech = _resample(waveform, sampling_rate, rate)
        speech = np.resize(speech, max(len(speech), round(LEAST_SECONDS * rate)))
        inputs = extractor(speech, sampling_rate=rate, return_tensors="pt")
        return torch.nn.functional.normalize(model(**inputs.to(self.device)).embeddings[0].float(), dim=0).cpu()

    def similarity(self, first: np.ndarray, second: np.ndarray, *, sampling_rate: int) -> float:
        """Cosine of the two voices, -1 to 1."""
        voices = [self.embed(waveform, sampling_rate=sampling_rate) for waveform in (first, second)]
        return float(voices[0] @ voices[1])


def _check_language(name: str, model: Any, language: str) -> None:
    """Raises UserError where a recogniser is of one language, or does not know this one."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    known = getattr(model.generation_config, "lang_to_id", None) if model.can_generate() else None
    if not known:
        raise UserError(f"{name}: this recogniser takes no language; found {language!r}, expected none")
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if f"<|{code}|>" not in known:
        codes = [token.strip("<|>") for token in known]
        names = sorted(name for name, code in TO_LANGUAGE_CODE.items() if code in codes)
        raise UserError(f"{name}: knows no language {language!r}; expected one of {', '.join(names)}")


def _weights_bytes(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def _resample(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    return librosa.resample(waveform, orig_sr=from_rate, target_sr=to_rate)
