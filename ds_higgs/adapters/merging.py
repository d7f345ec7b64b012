"""Reads an adapter onto a base model, and merges it into the weights in fp32 with one rounding at the end."""

from pathlib import Path
from typing import Any

import torch.distributed.tensor
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from ds_higgs.errors import UserError
from ds_higgs.files import read_json
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.split_weights import gathered, gathered_by_peft

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """Read `adapter`/adapter_config.json.

    Raises:
        UserError: if the folder holds no PEFT adapter in safetensors.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter}: not an adapter: expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    config = read_json(adapter / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{adapter / ADAPTER_CONFIG}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    return config


def load_adapter(model: HiggsAudioModel, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """Put the adapter in the folder `adapter` on `model`, in place; its own weights are kept in fp32.

    Raises:
        UserError: if it was made for another architecture: a tensor of it has no place in the model, or the model has
            a place that the adapter leaves empty.
    """
    read_adapter_config(adapter)
    try:
        with gathered_by_peft(model):
            peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable, local_files_only=True)
        _check_every_tensor_has_a_place(peft_model, adapter)
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{adapter}: the adapter does not fit the base checkpoint: {error}") from error
    return peft_model


def _check_every_tensor_has_a_place(peft_model: PeftModel, adapter: Path) -> None:
    """PEFT only warns of missing and unexpected tensors."""
    from peft import get_peft_model_state_dict

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
        stored = set(weights.keys())
    placed = set(get_peft_model_state_dict(peft_model))
    if stored != placed:
        examples = ", ".join(sorted(stored ^ placed)[:3])
        raise KeyError(f"{len(stored - placed)} tensors without a place, {len(placed - stored)} missing ({examples})")


def merge_adapter(peft_model: PeftModel, *, dtype: torch.dtype) -> HiggsAudioModel:
    """Add the LoRA updates to the weights, in place, and return the plain model in `dtype`.

    Every sum is made in fp32 and rounded once, to `dtype`; one layer at a time is in fp32.
    """
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer):
            with gathered(module.parameters(), changed=True):
                module.float()
                module.merge(safe_merge=True)
                module.to(dtype)
    return peft_model.unload().to(dtype)
