"""The DAC of transformers as an AudioCodec."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DacModel

from ds_higgs.data.codec.batched import BatchedCodec
from ds_higgs.data.codec.source import CodecKind, CodecSource, Geometry


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


def _recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "dac"


def _read_geometry(config: Mapping[str, Any]) -> Geometry:
    return Geometry(
        sampling_rate=config["sampling_rate"],
        hop_length=int(np.prod(config["downsampling_ratios"])),
        num_codebooks=config["n_codebooks"],
        codebook_size=config["codebook_size"],
    )


def _load(source: CodecSource, device: torch.device | str) -> DacCodec:
    return DacCodec(source, device=device)


KIND = CodecKind(
    name="dac",
    weights="model.safetensors",
    recognises=_recognises,
    read_geometry=_read_geometry,
    load=_load,
    expected="a DAC of transformers: config.json with model_type dac beside model.safetensors",
)
