"""Applies the memory and speed patches to a loaded model, each switchable, in the one order that works."""

from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ds_higgs.model.activation_checkpointing import enable_activation_checkpointing
from ds_higgs.model.kernels import apply_liger_kernels, liger_rotate
from ds_higgs.model.packed_rows import can_pack_rows, enable_packed_rows, torch_rotate


def apply_patches(
    model: HiggsAudioModel, *, packed_rows: bool, kernels: str, activation_checkpointing: int | None
) -> None:
    """Patch `model` in place, before or after LoRA. The results are those of the unpatched model up to rounding.

    Args:
        packed_rows: see `packed_rows.py`; models of another architecture than the released one keep the stock layers.
        kernels: "torch" or "liger", as `choose_kernels` gives it.
        activation_checkpointing: recompute every N-th layer; None for none.
    """
    if kernels == "liger":
        apply_liger_kernels(model)
    if packed_rows and can_pack_rows(model):
        enable_packed_rows(model, rotate=liger_rotate if kernels == "liger" else torch_rotate)
    if activation_checkpointing is not None:
        enable_activation_checkpointing(model, every=activation_checkpointing)
