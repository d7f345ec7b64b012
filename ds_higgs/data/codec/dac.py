"""The DAC of transformers as an AudioCodec."""

import numpy as np
import torch
from transformers import DacModel

from ds_higgs.data.codec.batched import BatchedCodec
from ds_higgs.data.codec.source import CodecSource


class DacCodec(BatchedCodec):
    """A DacModel folder; see AudioCodec."""

    def __init__(self, source: CodecSource, *, device: torch.device | str = "cpu"):
        super().__init__(source, device=device)
        self._model = DacModel.from_pretrained(source.folder, use_safetensors=True).eval().to(self.device)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> np.ndarray:
        audio = self._model.decode(audio_codes=codes.to(self.device).unsqueeze(0)).audio_values
        return audio.reshape(-1).float().cpu().numpy()

    def _encode_batch(self, batch: torch.Tensor) -> torch.Tensor:
        return self._model.encode(batch.unsqueeze(1)).audio_codes
