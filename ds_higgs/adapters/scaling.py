"""How much of an adapter: its weights scaled between the base (0) and what was trained (1), or beyond."""

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper


@torch.no_grad()
def scale_adapter(model: PeftModel, scale: float) -> None:
    """Scale what the active adapter adds to the base, in place, for speaking, merging and saving alike.

    LoRA's updates are multiplied; modules that were trained whole, and DoRA's magnitudes, go from the base's values to
    the trained ones in a straight line. At 0 the model is the base, bit for bit.
    """
    if scale == 1:
        return
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _scale_whole(module, scale)
        elif isinstance(module, LoraLayer):
            _scale_lora(module, scale)
    for config in model.peft_config.values():
        config.lora_alpha *= scale


def _scale_whole(module: ModulesToSaveWrapper, scale: float) -> None:
    original: torch.nn.Module = module.original_module
    base = dict(original.named_parameters())
    for copy in module.modules_to_save.values():
        for name, trained in copy.named_parameters():
            trained.copy_(torch.lerp(base[name].to(trained.dtype), trained, scale))


def _scale_lora(module: LoraLayer, scale: float) -> None:
    for name in module.scaling:
        module.scaling[name] *= scale
    for name, magnitude in cast(dict[str, Any], module.lora_magnitude_vector).items():
        weight: torch.Tensor = cast(Any, module.get_base_layer()).weight.to(magnitude.weight.dtype)
        none = torch.zeros((), dtype=weight.dtype, device=weight.device)
        # As DoRA takes it, without an update: the magnitude that leaves the base as it is.
        of_base = magnitude.get_weight_norm(weight, none, module.scaling[name])
        magnitude.weight.copy_(torch.lerp(of_base.to(magnitude.weight.dtype), magnitude.weight, scale))
