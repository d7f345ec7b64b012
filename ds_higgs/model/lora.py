"""LoRA on the attention and on both feed-forward paths, by PEFT, and what it makes trainable."""

import re
from collections.abc import Mapping, Sequence

import torch.distributed.tensor  # noqa: F401  (peft >= 0.18 uses it without importing it)
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ds_higgs.errors import UserError
from ds_higgs.model.parts import PATH_NAMES, TARGETS, path_of
from ds_higgs.model.split_weights import gathered_by_peft
from ds_higgs.model.whole_modules import check_no_overlap, check_peft_finds, find_whole_modules

_OF_LORA = re.compile(r"\.lora_\w+\.")
_TRAINED_COPY = re.compile(r"\.modules_to_save\.\w+\.")


def apply_lora(
    model: HiggsAudioModel,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] | Mapping[str, int] | str,
    modules_to_save: Sequence[str] | str = (),
    rslora: bool = False,
    dora: bool = False,
) -> PeftModel:
    """Freeze `model` and put LoRA on it, in place; its adapters have the model's dtype.

    Args:
        targets: any of `TARGETS`, with ranks of their own where it is a mapping, or one regular expression that has to
            match whole module names.
        modules_to_save: trained whole and saved with the adapter: any of `parts.WHOLE_PARTS`, or one expression as
            for `targets`, which may not match the same modules.

    Raises:
        UserError: for names and expressions that match nothing LoRA can be put on.
    """
    pattern = targets if isinstance(targets, str) else _join_targets(model, list(targets))
    whole = find_whole_modules(model, modules_to_save)
    check_no_overlap(whole, _find_targets(model, pattern))
    check_peft_finds(model, whole)
    config = LoraConfig(
        task_type=None,  # PEFT's causal-LM wrapper would pass `labels`
        r=rank,
        rank_pattern={TARGETS[path]: own for path, own in targets.items()} if isinstance(targets, Mapping) else {},
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        modules_to_save=whole or None,
        use_rslora=rslora,
        use_dora=dora,
    )
    with gathered_by_peft(model):
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def unwrap(model: PeftModel | HiggsAudioModel) -> HiggsAudioModel:
    """The HiggsAudioModel inside a PeftModel, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def count_parameters(model: PeftModel | HiggsAudioModel) -> dict[str, int]:
    """Count parameters, also of a model on the meta device or partitioned by ZeRO-3.

    Returns:
        `base` (without what LoRA adds), `total`, `trainable`, and the trainable ones in each of `parts.PATH_NAMES`; of
        those in layers, as `whole_attention` and the like, the ones that are not LoRA's.
    """
    counts = dict.fromkeys(("base", "total", "trainable", *PATH_NAMES, *map("whole_{}".format, TARGETS)), 0)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts["total"] += size
        original = _TRAINED_COPY.sub(".original_module.", name)
        is_copy = original != name and original in parameters
        if not (is_copy or _OF_LORA.search(name)):
            counts["base"] += size
        if parameter.requires_grad:
            counts["trainable"] += size
            path = path_of(name)
            counts[path] += size
            if path in TARGETS and not _OF_LORA.search(name):
                counts[f"whole_{path}"] += size
    return counts


def _join_targets(model: nn.Module, targets: Sequence[str]) -> str:
    """One expression for all `targets`, each of which has to be in `model`."""
    if not targets:
        raise UserError(f"lora.targets: is empty, expected any of {', '.join(TARGETS)} or a regular expression")
    for name in targets:
        if name not in TARGETS:
            raise UserError(f"lora.targets: found {name!r}, expected any of {', '.join(TARGETS)}")
        if not _matching(model, TARGETS[name]):
            raise UserError(f"lora.targets: this model has no {name} layers (no module is named {TARGETS[name]})")
    return "|".join(TARGETS[name] for name in targets)


def _find_targets(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that LoRA is put on."""
    try:
        matching = _matching(model, pattern)
    except re.error as error:
        raise UserError(f"lora.targets: {pattern!r} is not a regular expression: {error}") from error
    if not matching:
        raise UserError(
            f"lora.targets: no module's whole name matches {pattern!r}; names look like "
            "layers.0.self_attn.q_proj, layers.0.mlp.gate_proj, layers.0.audio_mlp.down_proj"
        )
    problems = [
        f"{name} is a {type(module).__name__}, expected a Linear or Embedding layer"
        for name, module in matching.items()
        if not isinstance(module, nn.Linear | nn.Embedding)
    ]
    if problems:
        raise UserError.from_problems(f"lora.targets: {pattern!r} matches what LoRA cannot be put on:", problems)
    return list(matching)


def _matching(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if re.fullmatch(pattern, name)}
