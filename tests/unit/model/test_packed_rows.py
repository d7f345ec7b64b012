"""Packed rows against the stock dual-FFN layers: equal hidden states, logits and gradients on odd shapes."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_higgs.model import packed_rows
from ds_higgs.model.activation_checkpointing import enable_activation_checkpointing
from ds_higgs.model.loading import build_meta_model, read_model_config
from ds_higgs.model.lora import unwrap
from ds_higgs.model.packed_rows import PackedRows, can_pack_rows, enable_packed_rows


def packed_copy(lora_model, *, checkpoint_every: int | None = None, dropout: float = 0.0):
    model = unwrap(lora_model(dropout))
    enable_packed_rows(model)
    if checkpoint_every:
        enable_activation_checkpointing(model, every=checkpoint_every)
    return model


def assert_same_training(expected: tuple, found: tuple) -> None:
    expected_loss, expected_grads = expected
    loss, grads = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            error = (grads[name] - grad).norm() / grad.norm().clamp(min=1e-6)
            assert error < 2e-6, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("checkpoint_every", [None, 1, 2])
def test_loss_and_gradients_are_those_of_the_stock_layers(lora_model, loss_and_grads, odd_inputs, checkpoint_every):
    expected = loss_and_grads(unwrap(lora_model()), odd_inputs)
    found = loss_and_grads(packed_copy(lora_model, checkpoint_every=checkpoint_every), odd_inputs)
    assert_same_training(expected, found)


def test_final_hidden_states_are_equal_where_there_is_a_token(lora_model, odd_inputs):
    stock, packed = unwrap(lora_model()), packed_copy(lora_model)
    found, expected = {}, {}
    packed.norm.register_forward_pre_hook(lambda module, args: found.update(hidden=args[0]))
    stock.norm.register_forward_pre_hook(lambda module, args: expected.update(hidden=args[0]))
    with torch.no_grad():
        real = stock(**odd_inputs, use_cache=False).attention_mask.bool()
        packed(**odd_inputs, use_cache=False)
    torch.testing.assert_close(found["hidden"][real], expected["hidden"][real], rtol=1e-5, atol=1e-6)
    assert not found["hidden"][~real].any()


def break_path_choice(monkeypatch):
    monkeypatch.setattr(PackedRows, "split", lambda self, rows: (rows, rows[rows.shape[0] :]))


def break_split_point(monkeypatch):
    monkeypatch.setattr(PackedRows, "split", lambda self, rows: (rows[: self.num_text + 1], rows[self.num_text + 1 :]))


def break_grid(monkeypatch):
    stock = PackedRows.to_grid
    monkeypatch.setattr(PackedRows, "to_grid", lambda self, rows: stock(self, rows).roll(1, dims=1))


def break_rope(monkeypatch):
    monkeypatch.setattr(packed_rows, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k))


def break_causality(monkeypatch):
    def attend(query, key, value):
        heads = (states.transpose(1, 2) for states in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(packed_rows, "_sdpa", attend)


@pytest.mark.parametrize(
    "break_it",
    [break_path_choice, break_split_point, break_grid, break_rope, break_causality],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("odd_inputs", ["unequal_lengths", "one_left_padded"], indirect=True)
def test_the_comparison_notices_what_is_broken(lora_model, loss_and_grads, odd_inputs, break_it, monkeypatch):
    expected = loss_and_grads(unwrap(lora_model()), odd_inputs)
    model = packed_copy(lora_model)
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_training(expected, loss_and_grads(model, odd_inputs))


def test_checkpointing_of_packed_rows_is_bit_equal_with_dropout(lora_model, loss_and_grads, odd_inputs):
    expected_loss, expected = loss_and_grads(packed_copy(lora_model, dropout=0.3), odd_inputs)
    loss, grads = loss_and_grads(packed_copy(lora_model, dropout=0.3, checkpoint_every=1), odd_inputs)
    assert torch.equal(loss, expected_loss)
    assert all(grad is None or torch.equal(grads[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("odd_inputs", ["unequal_lengths"], indirect=True)
def test_bf16_is_as_near_to_fp32_as_the_stock_layers_are(lora_model, odd_inputs):
    with torch.no_grad():
        exact = unwrap(lora_model())(**odd_inputs, use_cache=False)
        real = exact.attention_mask.bool()
        stock = unwrap(lora_model()).bfloat16()(**odd_inputs, use_cache=False).logits[real].float()
        packed = packed_copy(lora_model).bfloat16()(**odd_inputs, use_cache=False).logits[real].float()
    stock_error, packed_error = (stock - exact.logits[real]).norm(), (packed - exact.logits[real]).norm()
    assert 0 < packed_error < 1.2 * stock_error


class Synchronisations(TorchDispatchMode):
    """Names the operations that would make the host wait for a device."""

    WAITING = re.compile(r"aten\.(nonzero|_local_scalar_dense|masked_select|item|unique)")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if str(func).startswith(("aten.index.", "aten.index_put")) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or self.WAITING.match(str(func)):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("odd_inputs", ["several_segments"], indirect=True)
def test_no_synchronisation_inside_the_layers(lora_model, odd_inputs):
    def count(model) -> int:
        with torch.no_grad(), Synchronisations() as mode:
            model(**odd_inputs, use_cache=False)
        return len(mode.found)

    counts = {}
    for name, make in (("stock", lambda: unwrap(lora_model())), ("packed", lambda: packed_copy(lora_model))):
        whole, shallow = make(), make()
        del shallow.layers[2:]
        counts[name] = (count(whole) - count(shallow)) / 2
    assert counts["stock"] >= 6
    assert counts["packed"] == 0


@pytest.mark.parametrize("odd_inputs", ["several_segments", "one_left_padded"], indirect=True)
@pytest.mark.parametrize("asked", [{"use_cache": True}, {"output_hidden_states": True, "use_cache": False}])
def test_generation_and_asking_for_hidden_states_take_the_stock_path(lora_model, odd_inputs, asked):
    stock, packed = unwrap(lora_model()).eval(), packed_copy(lora_model).eval()
    with torch.no_grad():
        expected, found = stock(**odd_inputs, **asked), packed(**odd_inputs, **asked)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.audio_logits, expected.audio_logits)
    for one, other in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("odd_inputs", ["one_left_padded"], indirect=True)
def test_generation_goes_on_from_the_cache(lora_model, odd_inputs):
    stock, packed = unwrap(lora_model()).eval(), packed_copy(lora_model).eval()
    ids = {"input_ids": odd_inputs["input_ids"][:, :8], "attention_mask": odd_inputs["attention_mask"][:, :8]}
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    assert torch.equal(stock.generate(**ids, **settings)[0], packed.generate(**ids, **settings)[0])


def test_other_architectures_are_not_packed(tiny_base):
    config = read_model_config(tiny_base)
    assert can_pack_rows(build_meta_model(config))
    config.text_config.attention_dropout = 0.1
    assert not can_pack_rows(build_meta_model(config))
    config = read_model_config(tiny_base)
    config.audio_dual_ffn_layers = [0, 2]
    with pytest.raises(AssertionError, match="both feed-forward paths"):
        enable_packed_rows(build_meta_model(config))


def test_checkpointing_has_to_come_after(lora_model):
    model = unwrap(lora_model())
    enable_activation_checkpointing(model, every=1)
    with pytest.raises(AssertionError, match="before activation checkpointing"):
        enable_packed_rows(model)
