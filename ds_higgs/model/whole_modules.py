"""Modules that are trained whole beside LoRA: which they are, and what they leave of the base."""

import re
from collections.abc import Iterable, Sequence

from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ds_higgs.errors import UserError
from ds_higgs.model.parts import WHOLE_PARTS, is_used

KEY = "lora.modules_to_save"


def find_whole_modules(model: HiggsAudioModel, chosen: Sequence[str] | str) -> list[str]:
    """Names of the modules with weights of their own that are to be trained whole, of a model as it was loaded.

    Left out is what the base never uses, and what it holds fixed.

    Args:
        chosen: any of `WHOLE_PARTS`, or one expression that has to match whole module names.

    Raises:
        UserError: there are none, or their weights are packed into 4 bits.
    """
    if isinstance(chosen, str):
        found = _matching(model, chosen)
        if not found:
            raise UserError(
                f"{KEY}: no whole name of a module with weights matches {chosen!r}; names look like "
                "layers.0.audio_mlp.up_proj, layers.0.audio_input_layernorm, audio_codebook_embeddings"
            )
    else:
        found = [name for part in chosen for name in _of_part(model, part)]
    packed = [name for name in found if not _is_floating(model.get_submodule(name))]
    if packed:
        raise UserError(f"{KEY}: {_shown(packed)} lie in 4 bits and cannot be trained: leave out model.quantization")
    return found


def check_no_overlap(whole: Iterable[str], with_lora: Iterable[str]) -> None:
    """Raises UserError, naming the modules, where LoRA is put on what is trained whole."""
    both = sorted(set(whole) & set(with_lora))
    if both:
        raise UserError(f"lora.targets and {KEY} both match {_shown(both)}: expected each module in one of them")


def check_peft_finds(model: nn.Module, whole: Sequence[str]) -> None:
    """Raises UserError where PEFT, which takes every module whose name ends with a saved one's, would train more."""
    chosen = set(whole)
    others = [name for name, _ in model.named_modules() if name not in chosen]
    for name in whole:
        if more := [other for other in others if other.endswith(name)]:
            raise UserError(
                f"{KEY}: PEFT, which goes by the ends of names, would take {_shown(more)} for {name}: "
                "expected all of them, or none"
            )


def release_originals(model: PeftModel) -> None:
    """Let go of the base's own weights of modules that are trained whole; the adapter cannot be turned off any more."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module = None


def _of_part(model: HiggsAudioModel, part: str) -> list[str]:
    if part not in WHOLE_PARTS:
        raise UserError(f"{KEY}: found {part!r}, expected any of {', '.join(WHOLE_PARTS)}")
    found = _matching(model, WHOLE_PARTS[part])
    if not found:
        raise UserError(f"{KEY}: this model has no {part} (no module is named {WHOLE_PARTS[part]})")
    return found


def _matching(model: HiggsAudioModel, pattern: str) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name) and _can_learn(module) and is_used(model, f"{name}.weight")
    ]


def _can_learn(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and (all(weight.requires_grad for weight in own) or not _is_floating(module))


def _is_floating(module: nn.Module) -> bool:
    return all(weight.is_floating_point() for weight in module.parameters(recurse=False))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
