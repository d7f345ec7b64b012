"""Whisper's feature extractor, without any download."""

from dataclasses import dataclass
from pathlib import Path

from transformers import WhisperFeatureExtractor

from ds_higgs.errors import UserError
from ds_higgs.layout import MEL_HOP, WHISPER_RATE, WHISPER_SECONDS


@dataclass(frozen=True)
class WhisperProcessor:
    """As much of transformers' WhisperProcessor as boson's collator uses."""

    feature_extractor: WhisperFeatureExtractor


def build_whisper_processor(mel_bins: int, folder: Path | None = None) -> WhisperProcessor:
    """The processor of a folder with a preprocessor_config.json, else that of Whisper's published parameters.

    Raises:
        UserError: the folder's features are not what the audio tower takes.
    """
    if folder is None:
        # openai/whisper-large-v3's preprocessor_config.json: 30 s at 16 kHz, a 25 ms window every 10 ms.
        extractor = WhisperFeatureExtractor(
            feature_size=mel_bins,
            sampling_rate=WHISPER_RATE,
            hop_length=MEL_HOP,
            chunk_length=WHISPER_SECONDS,
            n_fft=400,
            padding_value=0.0,
        )
    else:
        extractor = WhisperFeatureExtractor.from_pretrained(folder)
    found = (extractor.feature_size, extractor.sampling_rate, extractor.hop_length, extractor.chunk_length)
    expected = (mel_bins, WHISPER_RATE, MEL_HOP, WHISPER_SECONDS)
    if found != expected:
        raise UserError(
            f"{folder}/preprocessor_config.json: (feature_size, sampling_rate, hop_length, chunk_length) is {found}; "
            f"the base checkpoint's audio tower expects {expected}"
        )
    return WhisperProcessor(extractor)
