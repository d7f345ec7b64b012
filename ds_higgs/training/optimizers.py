"""The optimizer: its keys of the DeepSpeed JSON, or what DeepSpeed is handed in their place, and what it needs here."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from ds_higgs.config import OptimConfig
from ds_higgs.errors import UserError
from ds_higgs.job.preflight import lacks_for_bitsandbytes


def check_optimizer(optim: OptimConfig, *, device_type: str) -> None:
    """Check that `optim.type` can work here, before anything is loaded.

    Raises:
        UserError: listing everything that is in the way.
    """
    if optim.type != "adamw_8bit":
        return
    if problems := lacks_for_bitsandbytes(device_type):
        raise UserError.from_problems(f"optim.type: {optim.type} cannot be used:", problems)


def optimizer_keys(optim: OptimConfig) -> dict[str, Any]:
    """Keys of the DeepSpeed JSON.

    AdamW is torch's own, for Muon too: DeepSpeed's are compiled at first use, which takes nvcc even with offload, where
    they gain nothing over torch's fused one (`benchmarks/offload.py`).
    """
    adam = {"betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay, "torch_adam": True}
    if optim.type == "adamw_8bit":
        return {"zero_allow_untested_optimizer": True}  # see `build_optimizer`
    if optim.type == "adamw":
        return {"optimizer": {"type": "AdamW", "params": {"lr": optim.learning_rate, **adam, "fused": True}}}
    rates = {"muon_lr": optim.learning_rate, "adam_lr": optim.adam_learning_rate or optim.learning_rate}
    return {"optimizer": {"type": "Muon", "params": {**rates, "momentum": optim.muon_momentum, **adam}}}


def build_optimizer(optim: OptimConfig) -> Callable[[list[Any]], Optimizer] | None:
    """What makes an optimizer of its parameters or groups, where DeepSpeed cannot from its JSON."""
    if optim.type != "adamw_8bit":
        return None

    def adamw_8bit(parameters: list[Any]) -> Optimizer:
        from bitsandbytes.optim import AdamW8bit  # optional, and loads CUDA's libraries

        return AdamW8bit(
            parameters, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )

    return adamw_8bit
