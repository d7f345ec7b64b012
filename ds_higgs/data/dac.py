"""The DAC of transformers as an AudioCodec."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DacModel

from ds_higgs.data.batched_encoding import encode_by_length
from ds_higgs.data.codec import CodecSource


class DacCodec:
    """A DacModel folder; see AudioCodec."""

    def __init__(self, source: CodecSource, *, device: torch.device | str = "cpu"):
        self.identity = source.identity
        self.sampling_rate = source.sampling_rate
        self.hop_length = source.hop_length
        self.num_codebooks = source.num_codebooks
        self.codebook_size = source.codebook_size
        self.device = torch.device(device)
        self._model = DacModel.from_pretrained(source.folder, use_safetensors=True).eval().to(self.device)

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        return encode_by_length(waveforms, self._encode_batch, hop_length=self.hop_length, device=self.device)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> np.ndarray:
        audio = self._model.decode(audio_codes=codes.to(self.device).unsqueeze(0)).audio_values
        return audio.reshape(-1).float().cpu().numpy()

    def _encode_batch(self, batch: torch.Tensor) -> torch.Tensor:
        return self._model.encode(batch.unsqueeze(1)).audio_codes
