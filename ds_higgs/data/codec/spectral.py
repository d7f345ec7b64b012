"""A codec of log-mel frames: principal components, residual codebooks and Griffin-Lim; see examples/small_base."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ds_higgs.data.codec.batched import BatchedCodec
from ds_higgs.data.codec.source import CodecKind, CodecSource, Geometry
from ds_higgs.errors import UserError
from ds_higgs.files import read_json

MODEL_TYPE = "spectral"
WEIGHTS = "model.safetensors"
_MOMENTUM = 0.99  # of Griffin-Lim: Perraudin, Balazs and Søndergaard (2013)


@dataclass(frozen=True)
class SpectralFrames:
    """How audio becomes vectors, one a code frame, and vectors audio: the numbers of a codec's config.json.

    spectra: mel spectra in a code frame. hop_length: samples between two of them.
    floor: magnitude that is added before the logarithm.
    """

    sampling_rate: int
    n_fft: int
    hop_length: int
    num_mels: int
    spectra: int
    floor: float
    griffin_lim_iterations: int

    def analyse(self, batch: torch.Tensor) -> torch.Tensor:
        """[batch, samples], whole code frames, float32 -> [batch, frames, spectra * mels] log magnitudes."""
        mels = torch.log(self._filters.to(batch.device) @ self._transform(batch).abs() + self.floor)
        whole = mels[..., : batch.shape[-1] // self.hop_length].transpose(1, 2)
        return whole.reshape(len(batch), -1, self.spectra * self.num_mels)

    def synthesise(self, vectors: torch.Tensor) -> torch.Tensor:
        """[frames, spectra * mels] log magnitudes -> [samples] float32; equal vectors give equal audio."""
        mels = vectors.reshape(-1, self.num_mels).T.exp().sub(self.floor).clamp(min=0)
        magnitudes = (self._inverse.to(vectors.device) @ mels).clamp(min=0)
        return self._find_audio(magnitudes, length=mels.shape[1] * self.hop_length)

    @cached_property
    def _filters(self) -> torch.Tensor:
        """[mels, bins]"""
        return torch.from_numpy(librosa.filters.mel(sr=self.sampling_rate, n_fft=self.n_fft, n_mels=self.num_mels))

    @cached_property
    def _inverse(self) -> torch.Tensor:
        """[bins, mels]"""
        return torch.linalg.pinv(self._filters)

    def _find_audio(self, magnitudes: torch.Tensor, *, length: int) -> torch.Tensor:
        """Fast Griffin-Lim from a phase that is always the same; [bins, spectra] magnitudes -> [length] samples."""
        magnitudes = F.pad(magnitudes, (0, 1))  # a centred transform has one spectrum more
        phase = torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
        angles = torch.polar(torch.ones_like(phase), phase).to(magnitudes.device)
        before = torch.zeros_like(angles)
        for _ in range(self.griffin_lim_iterations):
            rebuilt = self._transform(self._invert(magnitudes * angles, length))
            accelerated = rebuilt + _MOMENTUM * (rebuilt - before)
            angles, before = accelerated / accelerated.abs().clamp(min=1e-8), rebuilt
        return self._invert(magnitudes * angles, length)

    def _transform(self, audio: torch.Tensor) -> torch.Tensor:
        """[..., samples] -> [..., bins, spectra], complex."""
        window = torch.hann_window(self.n_fft, device=audio.device)
        return torch.stft(audio, self.n_fft, self.hop_length, window=window, pad_mode="constant", return_complex=True)

    def _invert(self, spectrum: torch.Tensor, length: int) -> torch.Tensor:
        window = torch.hann_window(self.n_fft, device=spectrum.device)
        return torch.istft(spectrum, self.n_fft, self.hop_length, window=window, length=length)


class SpectralCodec(BatchedCodec):
    """A folder that examples/small_base/learn_codec.py wrote; see AudioCodec."""

    def __init__(self, source: CodecSource, *, device: torch.device | str = "cpu"):
        super().__init__(source, device=device)
        self.frames = read_frames(read_json(source.folder / "config.json"))
        weights = load_file(source.folder / WEIGHTS, device=str(self.device))
        self._mean, self._components, self._codebooks = (
            weights[name].float() for name in ("mean", "components", "codebooks")
        )
        expected = (self.num_codebooks, self.codebook_size, len(self._components))
        if tuple(self._codebooks.shape) != expected:
            raise UserError(f"{source.folder}: codebooks of shape {tuple(self._codebooks.shape)}, expected {expected}")

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> np.ndarray:
        if codes.shape[1] == 0:
            return np.zeros(0, np.float32)
        chosen = [codebook[row] for codebook, row in zip(self._codebooks, codes.to(self.device), strict=True)]
        vectors = torch.stack(chosen).sum(dim=0) @ self._components + self._mean
        return self.frames.synthesise(vectors).cpu().numpy()

    def _encode_batch(self, batch: torch.Tensor) -> torch.Tensor:
        residual = (self.frames.analyse(batch) - self._mean) @ self._components.T
        codes = []
        for codebook in self._codebooks:
            distances = codebook.square().sum(dim=1) - 2 * residual @ codebook.T
            codes.append(distances.argmin(dim=-1))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=1)


def read_frames(config: Mapping[str, Any]) -> SpectralFrames:
    """The frames that a config.json describes; a KeyError names what it lacks."""
    return SpectralFrames(**{field.name: config[field.name] for field in fields(SpectralFrames)})


def _recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def _read_geometry(config: Mapping[str, Any]) -> Geometry:
    frames = read_frames(config)
    return Geometry(
        sampling_rate=frames.sampling_rate,
        hop_length=frames.hop_length * frames.spectra,
        num_codebooks=config["num_codebooks"],
        codebook_size=config["codebook_size"],
    )


def _load(source: CodecSource, device: torch.device | str) -> SpectralCodec:
    return SpectralCodec(source, device=device)


KIND = CodecKind(
    name=MODEL_TYPE,
    weights=WEIGHTS,
    recognises=_recognises,
    read_geometry=_read_geometry,
    load=_load,
    expected="a spectral one: config.json with model_type spectral beside model.safetensors",
)
