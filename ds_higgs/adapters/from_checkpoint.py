"""The trained weights in a checkpoint, under the names that they have in what a run hands out."""

from pathlib import Path

import torch

from ds_higgs.checkpoint.weights import CheckpointWeights
from ds_higgs.model.loading import DTYPES

MODULE_PREFIX = "peft_model."  # of StepModule, which DeepSpeed wraps
_ADAPTER_NAME = "default"


def read_adapter_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors in the precision of the run, as PEFT's `save_pretrained` would name them.

    Raises:
        UserError: if the checkpoint is incomplete or damaged, or asks to run code.
    """
    return {_adapter_name(name): weight for name, weight in read_trained(CheckpointWeights.open(checkpoint)).items()}


def read_trained(weights: CheckpointWeights) -> dict[str, torch.Tensor]:
    """All that a checkpoint trains, in the precision of the run, by the names of DeepSpeed's module."""
    dtype = DTYPES[weights.marker.precision]
    return {name: weights.read(name).to(dtype, copy=True) for name in weights.shapes}


def _adapter_name(name: str) -> str:
    """`peft_model.(...).lora_A.default.weight` -> `(...).lora_A.weight`; modules saved whole lose their wrapper."""
    name = name.removeprefix(MODULE_PREFIX)
    return name.replace(f".modules_to_save.{_ADAPTER_NAME}.", ".").replace(f".{_ADAPTER_NAME}.", ".")
