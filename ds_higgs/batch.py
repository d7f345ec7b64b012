"""One micro-batch, split once into what the model may see and what only the loss may see.

Between processes it travels by value. torch would send its tensors as handles that the receiver fetches from the
sender: a data worker that is stopped, or has no file handle left, would keep its rank waiting in there without end.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ds_higgs.layout import ExpandedSequence

IGNORE_INDEX = -100

# The label-free tensor arguments of HiggsAudioModel.forward (boson_multimodal 0.1.1).
MODEL_INPUT_NAMES = (
    "input_ids",  # [batch, seq] int64
    "attention_mask",  # [batch, seq] int64
    "audio_features",  # [num_audio_in, mel_bins, mel_frames] float32, with a Whisper tower only
    "audio_feature_attention_mask",  # [num_audio_in, mel_frames]
    "audio_in_ids",  # [codebooks, audio_in_frames] int64
    "audio_in_ids_start",  # [num_audio_in] int64
    "audio_out_ids",  # [codebooks, audio_out_frames] int64
    "audio_out_ids_start",  # [num_audio_out] int64
    "audio_out_ids_start_group_loc",  # [num_audio_out] int64
)


class ModelInputs(Mapping[str, torch.Tensor]):
    """Keyword arguments of HiggsAudioModel.forward that cannot hold a label.

    Arguments whose value is None are left out.

    expanded: the sequence with its placeholders expanded, for a forward that need not do it; no argument of it.

    Raises:
        TypeError: for any name that is not in MODEL_INPUT_NAMES (labels above all).
    """

    __slots__ = ("_tensors", "expanded")

    def __init__(self, *, expanded: ExpandedSequence | None = None, **tensors: torch.Tensor | None):
        self.expanded = expanded
        forbidden = sorted(set(tensors) - set(MODEL_INPUT_NAMES))
        if forbidden:
            raise TypeError(f"not a label-free input of HiggsAudioModel.forward: {', '.join(forbidden)}")
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def to(self, device: torch.device | str) -> "ModelInputs":
        """Copy to `device`, asynchronously where the source is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def __reduce__(self) -> tuple[Callable, tuple]:
        expanded = self.expanded.each(torch.Tensor.numpy) if self.expanded else None
        return _inputs_from_arrays, (expanded, _to_arrays(self))

    def pin_memory(self) -> "ModelInputs":
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ModelInputs":
        expanded = self.expanded.each(function) if self.expanded else None
        return ModelInputs(expanded=expanded, **{name: function(tensor) for name, tensor in self.items()})


@dataclass(frozen=True)
class Labels:
    """Targets as the collator lays them out: not shifted, IGNORE_INDEX where nothing is learned.

    text: [batch, seq] int64, aligned with `input_ids` (placeholders not expanded).
    audio: [codebooks, audio_out_frames] int64, aligned with `audio_out_ids`; every segment begins with IGNORE_INDEX
        in all codebooks, so that a shift over the concatenation never crosses segments.
    """

    text: torch.Tensor
    audio: torch.Tensor

    def to(self, device: torch.device | str) -> "Labels":
        return Labels(self.text.to(device, non_blocking=True), self.audio.to(device, non_blocking=True))

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _from_arrays, (Labels, _to_arrays({"text": self.text, "audio": self.audio}))

    def pin_memory(self) -> "Labels":
        return Labels(self.text.pin_memory(), self.audio.pin_memory())


@dataclass(frozen=True)
class Batch:
    """A collated micro-batch on its way from the data loader to the loss.

    sample_ids: one per sample, "FILE:INDEX" as in the manifest, for error reports.
    num_tokens: positions of the expanded sequence that hold a token (padding left out).
    source: the number of the source that all its samples are of, where several are mixed.
    """

    model_inputs: ModelInputs
    labels: Labels
    sample_ids: tuple[str, ...]
    num_tokens: int
    source: int = 0

    def to(self, device: torch.device | str) -> "Batch":
        return replace(self, model_inputs=self.model_inputs.to(device), labels=self.labels.to(device))

    def pin_memory(self) -> "Batch":
        """Called by the data loader's pinning thread."""
        return replace(self, model_inputs=self.model_inputs.pin_memory(), labels=self.labels.pin_memory())


def _to_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _inputs_from_arrays(expanded: ExpandedSequence | None, arrays: Mapping[str, np.ndarray]) -> ModelInputs:
    restored = expanded.each(torch.from_numpy, np.ndarray) if expanded else None
    return ModelInputs(expanded=restored, **{name: torch.from_numpy(array) for name, array in arrays.items()})


def _from_arrays(kind: Callable[..., Any], arrays: Mapping[str, np.ndarray]) -> Any:
    return kind(**{name: torch.from_numpy(array) for name, array in arrays.items()})


@dataclass(frozen=True)
class FixedPrompt:
    """One sample that is spoken again and again.

    number: its place among the prompts of the run; it names the WAV files.
    inputs: the model's, up to the speech.
    batch: the whole sample, for teacher-forced accuracy.
    target_codes: [codebooks, frames], what is to follow; empty where nothing is known.
    reference_codes: [codebooks, frames] of the last audio before it; None where there is none.
    text: what is to be said; None where nobody asked for it.
    """

    number: int
    sample_id: str
    inputs: ModelInputs
    batch: Batch
    target_codes: torch.Tensor
    reference_codes: torch.Tensor | None
    text: str | None = None
