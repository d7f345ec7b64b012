"""The trained weights in a checkpoint, under the names that PEFT gives them in an adapter."""

from pathlib import Path

import torch

from ds_higgs.checkpoint.finding import verify_checkpoint
from ds_higgs.checkpoint.marker import read_marker
from ds_higgs.checkpoint.pt_files import pt_files, read_pt
from ds_higgs.checkpoint.resharding import MASTER, join_stage_3
from ds_higgs.errors import UserError
from ds_higgs.model.loading import DTYPES

_MODULE_PREFIX = "peft_model."  # of StepModule, which DeepSpeed wraps
_ADAPTER_NAME = "default"


def read_adapter_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors in the precision of the run, as PEFT's `save_pretrained` would name them.

    Raises:
        UserError: if the checkpoint is incomplete or damaged, or asks to run code.
    """
    if problems := verify_checkpoint(checkpoint):
        raise UserError.from_problems(f"the checkpoint {checkpoint} cannot be used:", problems)
    marker = read_marker(checkpoint)
    weights = _gather_partitioned(checkpoint) if marker.zero_stage == 3 else _read_whole(checkpoint)
    return {
        _adapter_name(name): weights[name].reshape(shape).to(DTYPES[marker.precision]).contiguous()
        for name, shape in marker.trainable
    }


def _adapter_name(name: str) -> str:
    """`peft_model.(...).lora_A.default.weight` -> `(...).lora_A.weight`; modules saved whole lose their wrapper."""
    name = name.removeprefix(_MODULE_PREFIX)
    return name.replace(f".modules_to_save.{_ADAPTER_NAME}.", ".").replace(f".{_ADAPTER_NAME}.", ".")


def _read_whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Stages 0 to 2: rank 0's file holds every trained weight."""
    return read_pt(checkpoint / "mp_rank_00_model_states.pt")["module"]


def _gather_partitioned(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Stage 3: put together from every rank's part of the fp32 master weights."""
    shards = [read_pt(file)["optimizer_state_dict"] for file in pt_files(checkpoint, "optim_states.pt")]
    shapes = read_pt(pt_files(checkpoint, "model_states.pt")[0])["param_shapes"]
    return join_stage_3(shards, shapes)[MASTER]
