"""What a codec is to the rest: the interface, a codec's folder before it is loaded, and a kind of codec."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ds_higgs.errors import UserError
from ds_higgs.files import hash_file

CODES_VERSION = 1  # raise it when the same clip and codec would give other codes than before

# transformers' from_pretrained switches the initialisation of weights off for the whole process, and two at once can
# leave it off.
_loading = threading.Lock()


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

    def encode_each(self, waveforms: Sequence[np.ndarray]) -> Iterator[tuple[int, torch.Tensor]]:
        """The same, each clip's place among `waveforms` and its codes as soon as they are there, in any order."""
        ...

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """[codebooks, frames] codes -> mono float32 samples at `sampling_rate`."""
        ...


@dataclass(frozen=True)
class Geometry:
    """A codec's numbers, as its config.json says them.

    hop_length: samples of a frame. codebook_size: codes of a codebook.
    """

    sampling_rate: int
    hop_length: int
    num_codebooks: int
    codebook_size: int


def _no_files(folder: Path) -> Sequence[Path]:  # no lambda, which could not be sent to another process
    return ()


@dataclass(frozen=True)
class CodecKind:
    """One kind of codec: how its folder is known, read and loaded. `opening.KINDS` lists them all.

    weights: the file beside config.json that decides, with it, what codes come out.
    recognises: whether a folder with this config.json is of this kind.
    read_geometry: raises KeyError for what the config lacks.
    load: module-level, so that a CodecSource can be sent to another process.
    expected: what a user reads where no kind fits.
    other_files: more files that decide what codes come out, those of another model that encoding asks.
    """

    name: str
    weights: str
    recognises: Callable[[Path, Mapping[str, Any]], bool]
    read_geometry: Callable[[Mapping[str, Any]], Geometry]
    load: Callable[["CodecSource", torch.device | str], AudioCodec]
    expected: str
    other_files: Callable[[Path], Sequence[Path]] = _no_files

    def describe(self, folder: Path, config: Mapping[str, Any]) -> "CodecSource":
        """A folder of this kind, its weights fingerprinted.

        Raises:
            UserError: the weights are missing or cut off, or the config's numbers make no sense.
            KeyError: the config lacks something.
        """
        if not (folder / self.weights).is_file():
            raise UserError(f"{folder}: the audio codec ({self.name}) has no {self.weights}")
        geometry = self._checked_geometry(folder / "config.json", config)
        _check_whole(folder / self.weights)
        own = [folder / "config.json", folder / self.weights]
        others = self.other_files(folder)
        former = _identity(own) if others else None
        return CodecSource(folder, self, _identity([*own, *others]), **vars(geometry), former_identity=former)

    def _checked_geometry(self, file: Path, config: Mapping[str, Any]) -> Geometry:
        try:
            geometry = self.read_geometry(config)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{file}: not the config of an audio codec ({self.name}): {error}") from error
        for name, value in vars(geometry).items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise UserError(f"{file}: the audio codec's {name} is {value!r}, expected a whole number above 0")
        return geometry


@dataclass(frozen=True)
class CodecSource:
    """A codec's folder and what can be told of it without loading its weights.

    former_identity: what versions without `other_files` called it; such codes may be of another semantic model.
    """

    folder: Path
    kind: CodecKind
    identity: str
    sampling_rate: int
    hop_length: int
    num_codebooks: int
    codebook_size: int
    former_identity: str | None = None

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

    def frames_in(self, seconds: float) -> int:
        """Code frames of so much audio."""
        return int(self.count_frames(np.asarray([seconds]))[0])

    def load(self, device: torch.device | str = "cpu") -> AudioCodec:
        """Load the weights; threads take turns.

        Raises:
            UserError: they cannot be read, or do not fit the config.
        """
        try:
            with _loading:
                return self.kind.load(self, device)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers and boson's tokenizer raise of every kind for a damaged folder
            raise UserError(f"{self.folder}: the audio codec cannot be loaded: {error}") from error


def pad_to_hop(waveform: np.ndarray, hop_length: int) -> np.ndarray:
    """Zeros up to the next multiple of `hop_length`: part of what a clip's codes are, whatever is encoded beside it."""
    missing = -len(waveform) % hop_length
    return np.pad(waveform, (0, missing)) if missing else waveform


def _identity(files: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"ds_higgs codes {CODES_VERSION}\n".encode())
    for file in files:
        digest.update(hash_file(file).encode())
    return digest.hexdigest()


def _check_whole(weights: Path) -> None:
    """Compare a safetensors file's length with its header's, before a model has been loaded in vain."""
    if weights.suffix != ".safetensors":
        return
    try:
        with safe_open(weights, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: the audio codec's weights cannot be read: {error}") from error
