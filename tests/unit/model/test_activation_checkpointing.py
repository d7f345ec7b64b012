"""Activation checkpointing: bit-equal losses and gradients, dropout included, with less kept for the backward pass."""

import pytest
import torch
from torch import nn

from ds_higgs.model import activation_checkpointing
from ds_higgs.model.activation_checkpointing import enable_activation_checkpointing, is_checkpointed
from ds_higgs.model.lora import unwrap


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other is None or (one is not None and other is not None and torch.equal(one, other))


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_bit_equal_with_dropout_on(lora_model, loss_and_grads, odd_inputs, every: int):
    plain, checkpointed = unwrap(lora_model(dropout=0.3)), unwrap(lora_model(dropout=0.3))
    enable_activation_checkpointing(checkpointed, every=every)
    expected_loss, expected = loss_and_grads(plain, odd_inputs)
    loss, grads = loss_and_grads(checkpointed, odd_inputs)
    assert torch.equal(loss, expected_loss)
    assert grads.keys() == expected.keys()
    assert not [name for name, grad in expected.items() if not same(grads[name], grad)]


def test_the_comparison_notices_other_dropout_masks(lora_model, loss_and_grads, odd_inputs, monkeypatch):
    def forget_random_state(function, *args, use_reentrant, **kwargs):
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    monkeypatch.setattr(activation_checkpointing, "checkpoint", forget_random_state)
    plain, checkpointed = unwrap(lora_model(dropout=0.3)), unwrap(lora_model(dropout=0.3))
    enable_activation_checkpointing(checkpointed, every=1)
    _, expected = loss_and_grads(plain, odd_inputs)
    _, grads = loss_and_grads(checkpointed, odd_inputs)
    assert not all(same(grads[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize(("every", "expected"), [(1, {0, 1, 2, 3}), (2, {0, 2}), (3, {0, 3}), (9, {0})])
def test_every_nth_layer_is_wrapped(lora_model, every: int, expected: set[int]):
    model = unwrap(lora_model())
    enable_activation_checkpointing(model, every=every)
    assert {index for index, layer in enumerate(model.layers) if is_checkpointed(layer)} == expected


def count_saved_bytes(model: nn.Module, inputs) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs, use_cache=False)
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_less_is_kept_for_the_backward_pass(lora_model, odd_inputs):
    sizes = {}
    for every in (None, 2, 1):
        model = unwrap(lora_model())
        if every:
            enable_activation_checkpointing(model, every=every)
        sizes[every] = count_saved_bytes(model, odd_inputs)
    assert sizes[1] < sizes[2] < sizes[None]


def test_generation_takes_the_plain_path(lora_model, odd_inputs, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("checkpointed")

    monkeypatch.setattr(activation_checkpointing, "checkpoint", refuse)
    model = unwrap(lora_model())
    enable_activation_checkpointing(model, every=1)
    with torch.no_grad():
        model(**odd_inputs, use_cache=False)
    model(**odd_inputs, use_cache=True)
    with pytest.raises(AssertionError, match="checkpointed"):
        model(**odd_inputs, use_cache=False)


def test_enabling_twice_is_a_mistake(lora_model):
    model = unwrap(lora_model())
    enable_activation_checkpointing(model, every=1)
    with pytest.raises(AssertionError, match="already"):
        enable_activation_checkpointing(model, every=1)
