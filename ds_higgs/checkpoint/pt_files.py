"""Reads DeepSpeed's `.pt` files, which are pickles, without letting them run code: tensors and a few named classes."""

import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ds_higgs.errors import UserError

# What DeepSpeed's optimizers put beside their tensors: plain values, none of which does anything when it is built.
_ALLOWED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]


def read_pt(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a file that DeepSpeed wrote, its tensors to the CPU.

    Args:
        mapped: leave the tensors in the file until they are used, and give their memory back with the last of them.

    Raises:
        UserError: naming the file and what it asks for, where that is anything but tensors, plain values and the few
            classes of DeepSpeed's that a checkpoint needs.
    """
    with safe_globals(_ALLOWED_CLASSES):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: refused: {_describe(path, error)}") from error


def _describe(path: Path, error: pickle.UnpicklingError) -> str:
    try:
        asked_for = sorted(get_unsafe_globals_in_checkpoint(path))
    except (pickle.UnpicklingError, ValueError, RuntimeError):  # no archive, or none that can be read to its end
        asked_for = []
    if asked_for:
        return f"it would run {', '.join(asked_for)}, which no checkpoint needs"
    return f"it is not what DeepSpeed writes ({str(error).splitlines()[0]})"


def pt_files(checkpoint: Path, ending: str) -> list[Path]:
    """DeepSpeed's files of one kind in rank order: `zero_pp_rank_10_...` comes after `zero_pp_rank_9_...`."""
    return sorted(
        checkpoint.glob(f"*{ending}"), key=lambda file: [int(word) for word in file.stem.split("_") if word.isdigit()]
    )


class PtReader(TorchCheckpointEngine):
    """Takes the place of DeepSpeed's checkpoint reader for one load."""

    def load(self, path: str, map_location: object = None) -> dict[str, Any]:
        return read_pt(Path(path))
