"""Recomputes decoder layers in the backward pass instead of keeping their activations."""

import functools

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from torch import nn
from torch.utils.checkpoint import checkpoint


def enable_activation_checkpointing(model: HiggsAudioModel, *, every: int) -> None:
    """Checkpoint layers 0, every, 2 x every, ... of `model`, in place; 1 means every layer.

    `gradient_checkpointing_enable()` would reach only the Whisper tower: the decoder layers ignore it. The random
    state is restored for the recomputation, so gradients are bit-equal, dropout included. Has no effect without
    gradients and in generation, where a recomputed layer would write to the key-value cache twice.

    What replaces a layer's forward has to do so before this call.
    """
    assert every >= 1
    for layer in model.layers[::every]:
        assert not is_checkpointed(layer), "activation checkpointing is enabled already"
        layer.forward = functools.partial(_checkpointed, layer.forward)


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether `enable_activation_checkpointing` has wrapped this layer."""
    forward = layer.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _checkpointed


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled() or kwargs.get("use_cache"):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
