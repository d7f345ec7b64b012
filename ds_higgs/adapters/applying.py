"""Puts what a run has trained on its base, whatever the way of training."""

from ds_higgs.adapters.merging import load_adapter
from ds_higgs.adapters.opening import Adapter
from ds_higgs.adapters.scaling import scale_adapter
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.lora import unwrap


def put_on(model: HiggsAudioModel, adapter: Adapter, *, scale: float = 1.0) -> HiggsAudioModel:
    """`model`, the base, with the adapter's layers in place or its weights exchanged.

    Args:
        scale: how much of what was trained: 0 is the base, bit for bit.

    Raises:
        UserError: it was made for another architecture.
    """
    if adapter.whole is not None:
        adapter.whole.put_on(model, scale=scale, where=str(adapter.source))
        return model
    adapted = load_adapter(model, adapter.folder)
    scale_adapter(adapted, scale)
    return unwrap(adapted)
