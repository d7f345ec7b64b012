"""Audio codecs behind one interface: a Hugging Face DAC folder, or boson's Higgs audio tokenizer."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from ds_higgs.errors import UserError
from ds_higgs.files import hash_file, read_json

HIGGS_TOKENIZER = "bosonai/higgs-audio-v2-tokenizer"
HIGGS_TOKENIZER_REVISION = "9d4988fbd4ad07b4cac3a5fa462741a41810dbec"  # the last in boson's own format
CODES_VERSION = 1  # raise it when the same clip and codec would give other codes than before


class AudioCodec(Protocol):
    """Turns speech into codes and back.

    identity: names the codec's weights and the way of encoding; equal identities give equal codes.
    """

    identity: str
    sampling_rate: int
    hop_length: int
    num_codebooks: int
    codebook_size: int

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Mono float32 clips at `sampling_rate` -> for each [codebooks, ceil(samples / hop_length)] int64 on the CPU.

        A clip's codes do not depend on the clips beside it.
        """
        ...

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """[codebooks, frames] codes -> mono float32 samples at `sampling_rate`."""
        ...


@dataclass(frozen=True)
class CodecSource:
    """A codec's folder and what can be told of it without loading its weights."""

    folder: Path
    kind: Literal["dac", "higgs"]
    identity: str
    sampling_rate: int
    hop_length: int
    num_codebooks: int
    codebook_size: int

    def check_fits(self, *, num_codebooks: int, codebook_size: int) -> None:
        """Raises UserError where the codec's codes are not what the base checkpoint was made for."""
        if (self.num_codebooks, self.codebook_size) != (num_codebooks, codebook_size):
            raise UserError(
                f"{self.folder}: the codec has {self.num_codebooks} codebooks x {self.codebook_size} codes; "
                f"the base checkpoint expects {num_codebooks} x {codebook_size}"
            )

    def count_frames(self, seconds: np.ndarray) -> np.ndarray:
        """Code frames of clips of these lengths, [num_clips] int64."""
        return np.ceil(np.round(seconds * self.sampling_rate, 3) / self.hop_length).astype(np.int64)

    def load(self, device: torch.device | str = "cpu") -> AudioCodec:
        """Load the weights."""
        if self.kind == "dac":
            from ds_higgs.data.codec.dac import DacCodec

            return DacCodec(self, device=device)
        from ds_higgs.data.codec.higgs import HiggsTokenizerCodec

        return HiggsTokenizerCodec(self, device=device)


def find_codec(codec: str | Path | None, base: Path | None = None) -> CodecSource:
    """Describe the codec that a config names.

    codec: a folder, a hub id, or None for the base checkpoint's own `codec` folder, else the released Higgs tokenizer.

    Raises:
        UserError: there is no codec, or one of an unknown kind.
    """
    if codec is None:
        own = base / "codec" if base is not None else None
        codec = own if own is not None and own.is_dir() else HIGGS_TOKENIZER
    folder = Path(codec)
    return describe_codec(folder if folder.exists() else _download(str(codec)))


def load_codec(codec: str | Path, *, device: torch.device | str = "cpu") -> AudioCodec:
    """Describe and load a codec at once."""
    return find_codec(codec).load(device)


def describe_codec(folder: Path) -> CodecSource:
    """Read a codec folder's config.json and fingerprint its weights.

    Raises:
        UserError: not a folder of a DAC of transformers (config.json, model.safetensors) nor of boson's tokenizer
            (config.json, model.pth).
    """
    config = _read_config(folder)
    try:
        if config.get("model_type") == "dac":
            return _describe_dac(folder, config)
        if "ratios" in config and (folder / "model.pth").is_file():
            return _describe_higgs(folder, config)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: the audio codec's config lacks {error}") from None
    raise UserError(
        f"{folder}: not an audio codec; expected config.json with model_type dac beside model.safetensors, "
        "or boson's tokenizer: config.json with `ratios` beside model.pth"
    )


def pad_to_hop(waveform: np.ndarray, hop_length: int) -> np.ndarray:
    """Zeros up to the next multiple of `hop_length`: part of what a clip's codes are, whatever is encoded beside it."""
    missing = -len(waveform) % hop_length
    return np.pad(waveform, (0, missing)) if missing else waveform


def _read_config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not an audio codec: there is no config.json")
    return read_json(folder / "config.json")


def _describe_dac(folder: Path, config: dict) -> CodecSource:
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder}: the DAC codec has no model.safetensors")
    return CodecSource(
        folder=folder,
        kind="dac",
        identity=_identity(folder, "model.safetensors"),
        sampling_rate=config["sampling_rate"],
        hop_length=int(np.prod(config["downsampling_ratios"])),
        num_codebooks=config["n_codebooks"],
        codebook_size=config["codebook_size"],
    )


def _describe_higgs(folder: Path, config: dict) -> CodecSource:
    bins = config.get("bins", 1024)
    return CodecSource(
        folder=folder,
        kind="higgs",
        identity=_identity(folder, "model.pth"),
        sampling_rate=config.get("sample_rate", 16000),
        hop_length=int(np.prod(config["ratios"])),
        num_codebooks=config.get("n_q", 8),
        codebook_size=bins if isinstance(bins, int) else int(np.prod(bins)),
    )


def _identity(folder: Path, weights: str) -> str:
    digest = hashlib.sha256(f"ds_higgs codes {CODES_VERSION}\n".encode())
    for name in ("config.json", weights):
        digest.update(hash_file(folder / name).encode())
    return digest.hexdigest()


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    revision = HIGGS_TOKENIZER_REVISION if hub_id == HIGGS_TOKENIZER else None
    try:
        return Path(snapshot_download(hub_id, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"audio codec {hub_id}: neither a folder nor a hub repository that can be had: {reason}"
        ) from None
