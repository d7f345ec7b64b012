"""How a base checkpoint lays audio out in its sequence, and how many positions that takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

STREAM_BOS_AND_EOS = 2
WHISPER_RATE = 16000
WHISPER_SECONDS = 30  # the longest reference audio that becomes one placeholder's features
MEL_HOP = 160  # samples at WHISPER_RATE per mel frame

Count = TypeVar("Count", int, np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class AudioLayout:
    """How a base checkpoint lays audio out in its sequence; the collator's settings.

    audio_in_tokens: whether reference audio enters as codes.
    whisper: whether it enters as Whisper features too.
    mel_bins: of the Whisper features.
    whisper_folder: with a preprocessor_config.json for them; None takes Whisper's published parameters.
    """

    audio_in_token: int
    audio_out_token: int
    pad_token: int
    stream_bos: int
    stream_eos: int
    num_codebooks: int
    codebook_size: int
    delay_pattern: bool
    audio_in_tokens: bool
    whisper: bool = False
    mel_bins: int = 128
    whisper_folder: Path | None = None

    @classmethod
    def from_config(
        cls, config: Any, *, use_delay_pattern: bool | None = None, encode_whisper_embed: bool | None = None
    ) -> "AudioLayout":
        """The layout of a HiggsAudioConfig; None takes what the config says."""
        folder = Path(config.name_or_path) if config.name_or_path else None
        has_own = folder is not None and (folder / "preprocessor_config.json").is_file()
        return cls(
            audio_in_token=config.audio_in_token_idx,
            audio_out_token=config.audio_out_token_idx,
            pad_token=config.pad_token_id,
            stream_bos=config.audio_stream_bos_id,
            stream_eos=config.audio_stream_eos_id,
            num_codebooks=config.audio_num_codebooks,
            codebook_size=config.audio_codebook_size,
            delay_pattern=config.use_delay_pattern if use_delay_pattern is None else use_delay_pattern,
            audio_in_tokens=config.encode_audio_in_tokens,
            whisper=config.encode_whisper_embed if encode_whisper_embed is None else encode_whisper_embed,
            mel_bins=config.audio_encoder_config.num_mel_bins,
            whisper_folder=folder if has_own else None,
        )

    def audio_targets(self, tokens: np.ndarray, supervised: np.ndarray) -> np.ndarray:
        """For each clip, in order, whether it is learned: [num_clips] bool.

        Args:
            tokens: [num_tokens]; supervised: [num_tokens] bool.
        """
        return supervised[(tokens == self.audio_in_token) | (tokens == self.audio_out_token)]

    def stream_length(self, num_frames: Count) -> Count:
        """Positions that a clip of `num_frames` code frames takes: stream BOS and EOS, and the delay."""
        return num_frames + STREAM_BOS_AND_EOS + (self.num_codebooks - 1 if self.delay_pattern else 0)

    def count_positions(self, tokens: np.ndarray, frames: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Positions that each token takes in the model: a placeholder gives way to its codes and Whisper features.

        Args:
            tokens: [num_tokens]; frames, seconds: [num_clips], code frames and length of each placeholder's audio.

        Returns:
            [num_tokens] int64.
        """
        placeholder = (tokens == self.audio_in_token) | (tokens == self.audio_out_token)
        is_input = tokens[placeholder] == self.audio_in_token
        codes = self.stream_length(frames)
        if self.whisper:
            samples = np.ceil(np.round(seconds * WHISPER_RATE, 3))
            features = whisper_positions(np.ceil(samples / MEL_HOP).astype(np.int64))
            inputs = features + codes if self.audio_in_tokens else features
        else:
            inputs = codes if self.audio_in_tokens else np.ones_like(codes)  # else nothing takes the token's place
        positions = np.ones(len(tokens), dtype=np.int64)
        positions[placeholder] = np.where(is_input, inputs, codes)
        return positions


def whisper_positions(mel_frames: Count) -> Count:
    """Positions that the audio tower makes of so many mel frames (its convolution and pooling halve them twice)."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1
