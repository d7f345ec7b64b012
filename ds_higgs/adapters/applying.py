"""Puts what a run has trained on its base, whatever the way of training."""

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def wearing(model: HiggsAudioModel, adapter: Adapter) -> Iterator[HiggsAudioModel]:
    """`model`, a base that speaks, with the adapter on it for a while: its weights are read once for many adapters.

    Afterwards a PEFT adapter is off again. Whole weights stay until those of another adapter of the same run, which
    are the same tensors, take their place.

    Raises:
        UserError: it was made for another architecture.
    """
    children = [(module, dict(module._modules)) for module in model.modules()]
    try:
        yield put_on(model, adapter).eval().to(model.device)
    finally:
        for module, own in children:
            module._modules.clear()
            module._modules.update(own)
        if hasattr(model, "peft_config"):
            del model.peft_config
