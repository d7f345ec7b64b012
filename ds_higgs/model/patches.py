"""Applies the memory and speed patches to a loaded model, each switchable, in the one order that works."""

import functools
from dataclasses import replace

from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ds_higgs.errors import UserError
from ds_higgs.model.activation_checkpointing import enable_activation_checkpointing
from ds_higgs.model.fused_layer import LEAST_ROWS, compiled_functions
from ds_higgs.model.grouped_lora import project, project_one_by_one
from ds_higgs.model.kernels import apply_liger_kernels
from ds_higgs.model.layer_kernels import build_layer_kernels
from ds_higgs.model.packed_rows import LayerParts, can_pack_rows, enable_packed_rows


def apply_patches(
    model: HiggsAudioModel,
    *,
    packed_rows: bool,
    kernels: str,
    activation_checkpointing: int | None,
    grouped_lora: bool = True,
    compiled: bool = False,
    varlen: bool = False,
) -> None:
    """Patch `model` in place, before or after LoRA. The results are those of the unpatched model up to rounding.

    Args:
        packed_rows: see `packed_rows.py`; models of another architecture than the released one keep the stock layers.
        kernels: "plain", "torch" or "liger", as `choose_kernels` gives it.
        activation_checkpointing: recompute every N-th layer; None for none.
        grouped_lora: see `grouped_lora.py`; for packed rows alone.
        compiled: whether torch.compile makes the torch kernels, with grouped LoRA fused around the matrix products (see
            `fused_layer.py`); for packed rows alone.
        varlen: whether attention runs without padding, see `attention.varlen`.

    Raises:
        UserError: for `varlen` where rows cannot be packed.
    """
    if varlen and not can_pack_rows(model):
        raise UserError("memory.attention: varlen needs packed rows, which this base's architecture does not allow")
    if kernels == "liger":
        apply_liger_kernels(model)
    if packed_rows and can_pack_rows(model):
        chosen = build_layer_kernels(kernels, compiled=compiled)
        parts = LayerParts(kernels=chosen, project=project if grouped_lora else project_one_by_one, varlen=varlen)
        if kernels == "torch" and compiled and grouped_lora:
            parts = replace(parts, fused=compiled_functions(), least_fused_rows=LEAST_ROWS)
        enable_packed_rows(model, parts=parts)
        if kernels == "torch":  # Liger's is on every norm already
            model.norm.forward = functools.partial(chosen.norm, model.norm)
    if activation_checkpointing is not None:
        enable_activation_checkpointing(model, every=activation_checkpointing)
