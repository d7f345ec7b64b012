"""LoRA on the attention and on both feed-forward paths, by PEFT, and what it makes trainable."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch.distributed.tensor  # noqa: F401  (peft >= 0.18 uses it without importing it)
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ds_higgs.errors import UserError

# Module names inside HiggsAudioModel, matched whole: a bare `gate_proj` would be in both feed-forward paths, and the
# Whisper tower has layers of its own.
TARGETS: Mapping[str, str] = {
    "attention": r"layers\.\d+\.self_attn\.[qkvo]_proj",
    "text_ffn": r"layers\.\d+\.mlp\.(?:gate|up|down)_proj",
    "audio_ffn": r"layers\.\d+\.audio_mlp\.(?:gate|up|down)_proj",
}
MODULES_TO_SAVE: Mapping[str, str] = {
    "audio_head": "audio_decoder_proj.audio_lm_head",
    "audio_embeddings": "audio_codebook_embeddings",
    "text_head": "audio_decoder_proj.text_lm_head",
}

_PATHS: Mapping[str, re.Pattern[str]] = {
    "attention": re.compile(r"(?<!audio_tower\.)layers\.\d+\.self_attn\."),
    "text_ffn": re.compile(r"(?<!audio_tower\.)layers\.\d+\.mlp\."),
    "audio_ffn": re.compile(r"(?<!audio_tower\.)layers\.\d+\.audio_mlp\."),
    "audio_head": re.compile(r"audio_decoder_proj\.audio_lm_head\."),
    "audio_embeddings": re.compile(r"audio_codebook_embeddings\."),
    "text_head": re.compile(r"audio_decoder_proj\.text_lm_head\."),
    "text_embeddings": re.compile(r"(?:^|\.)embed_tokens\."),
}
_ADDED_BY_PEFT = re.compile(r"\.(?:lora_\w+|modules_to_save)\.")


def apply_lora(
    model: HiggsAudioModel,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] | Mapping[str, int] | str,
    modules_to_save: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
) -> PeftModel:
    """Freeze `model` and put LoRA on it, in place; its adapters have the model's dtype.

    Args:
        targets: any of `TARGETS`, with ranks of their own where it is a mapping, or one regular expression that has to
            match whole module names.
        modules_to_save: any of `MODULES_TO_SAVE`, trained in full and saved with the adapter.

    Raises:
        UserError: for names and expressions that match nothing LoRA can be put on.
    """
    pattern = targets if isinstance(targets, str) else _join_targets(model, list(targets))
    full_modules = [_lookup(MODULES_TO_SAVE, name, key="lora.modules_to_save") for name in modules_to_save]
    _check_matches(model, pattern, full_modules)
    config = LoraConfig(
        task_type=None,  # PEFT's causal-LM wrapper would pass `labels`
        r=rank,
        rank_pattern={TARGETS[path]: own for path, own in targets.items()} if isinstance(targets, Mapping) else {},
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        modules_to_save=full_modules or None,
        use_rslora=rslora,
        use_dora=dora,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def unwrap(model: PeftModel | HiggsAudioModel) -> HiggsAudioModel:
    """The HiggsAudioModel inside a PeftModel, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def count_parameters(model: PeftModel | HiggsAudioModel) -> dict[str, int]:
    """Count parameters, also of a model on the meta device or partitioned by ZeRO-3.

    Returns:
        `base` (without what LoRA adds), `total`, `trainable`, and the trainable ones in each of `attention`,
        `text_ffn`, `audio_ffn`, `audio_head`, `audio_embeddings`, `text_head`, `text_embeddings` and `other`.
    """
    counts = dict.fromkeys(("base", "total", "trainable", *_PATHS, "other"), 0)
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts["total"] += size
        if not _ADDED_BY_PEFT.search(name):
            counts["base"] += size
        if parameter.requires_grad:
            counts["trainable"] += size
            counts[_path_of(name)] += size
    return counts


def _path_of(parameter_name: str) -> str:
    return next((path for path, pattern in _PATHS.items() if pattern.search(parameter_name)), "other")


def _join_targets(model: nn.Module, targets: Sequence[str]) -> str:
    """One expression for all `targets`, each of which has to be in `model`."""
    if not targets:
        raise UserError(f"lora.targets: is empty, expected any of {', '.join(TARGETS)} or a regular expression")
    patterns = [_lookup(TARGETS, name, key="lora.targets") for name in targets]
    for name, pattern in zip(targets, patterns, strict=True):
        if not _matching(model, pattern):
            raise UserError(f"lora.targets: this model has no {name} layers (no module is named {pattern})")
    return "|".join(patterns)


def _check_matches(model: nn.Module, pattern: str, full_modules: Iterable[str]) -> None:
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
    problems += [f"{name} is in lora.modules_to_save too" for name in full_modules if name in matching]
    if problems:
        raise UserError.from_problems(f"lora.targets: {pattern!r} matches what LoRA cannot be put on:", problems)


def _matching(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if re.fullmatch(pattern, name)}


def _lookup(known: Mapping[str, str], name: str, *, key: str) -> str:
    if name not in known:
        raise UserError(f"{key}: found {name!r}, expected any of {', '.join(known)}")
    return known[name]
