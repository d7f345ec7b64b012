"""Packed rows against the stock dual-FFN layers: equal hidden states, logits and gradients on odd shapes."""

import inspect
import re

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ds_higgs.model import layer_kernels, packed_rows
from ds_higgs.model.activation_checkpointing import enable_activation_checkpointing
from ds_higgs.model.fused_layer import Functions
from ds_higgs.model.grouped_lora import project_one_by_one
from ds_higgs.model.layer_kernels import plain_kernels
from ds_higgs.model.loading import build_meta_model, read_model_config
from ds_higgs.model.lora import unwrap
from ds_higgs.model.packed_rows import LayerParts, PackedRows, can_pack_rows, enable_packed_rows
from tests.support.gradients import assert_same_training


def packed_copy(lora_model, *, checkpoint_every: int | None = None, dropout: float = 0.0, parts=None):
    model = unwrap(lora_model(dropout))
    enable_packed_rows(model, parts=parts)
    if checkpoint_every:
        enable_activation_checkpointing(model, every=checkpoint_every)
    return model


@pytest.mark.parametrize("checkpoint_every", [None, 1, 2])
def test_loss_and_gradients_are_those_of_the_stock_layers(lora_model, loss_and_grads, odd_inputs, checkpoint_every):
    expected = loss_and_grads(unwrap(lora_model()), odd_inputs)
    found = loss_and_grads(packed_copy(lora_model, checkpoint_every=checkpoint_every), odd_inputs)
    assert_same_training(expected, found)


@pytest.mark.parametrize("whole", [("audio_ffn", "audio_norms"), ("attention",)], ids=str)
@pytest.mark.parametrize("odd_inputs", ["unequal_lengths", "no_audio"], indirect=True)
def test_layers_that_are_trained_whole_beside_lora_are_too(lora_model, loss_and_grads, odd_inputs, whole):
    expected = loss_and_grads(unwrap(lora_model(whole=whole)), odd_inputs)
    packed = unwrap(lora_model(whole=whole))
    enable_packed_rows(packed)
    assert_same_training(expected, loss_and_grads(packed, odd_inputs))


def in_fp64(model, inputs) -> dict[str, torch.Tensor]:
    """Text logits of the tokens, and the gradients of a loss over them."""
    outputs = model.double()(**inputs, use_cache=False)
    logits = outputs.logits[outputs.attention_mask.bool()]
    logits.logsumexp(-1).square().mean().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {**grads, "logits": logits.detach()}


def test_in_fp64_nothing_differs(lora_model, odd_inputs, monkeypatch):
    def norm(self, hidden):  # the stock one computes in fp32
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    expected, found = in_fp64(unwrap(lora_model()), odd_inputs), in_fp64(packed_copy(lora_model), odd_inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-12 * value.norm().clamp(min=1e-3), name


SWITCHED_OFF = {
    "plain kernels": LayerParts(kernels=plain_kernels()),
    "one by one": LayerParts(project=project_one_by_one),
    "both": LayerParts(kernels=plain_kernels(), project=project_one_by_one),
}


@pytest.mark.parametrize("off", SWITCHED_OFF)
@pytest.mark.parametrize("odd_inputs", ["unequal_lengths", "no_audio"], indirect=True)
def test_each_part_can_be_switched_off(lora_model, loss_and_grads, odd_inputs, off: str):
    expected = loss_and_grads(unwrap(lora_model()), odd_inputs)
    assert_same_training(expected, loss_and_grads(packed_copy(lora_model, parts=SWITCHED_OFF[off]), odd_inputs))


def attend_one_by_one(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
) -> torch.Tensor:
    """What torch's varlen_attn computes, which has a kernel for CUDA alone: each sample by SDPA."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert (cu_seq_q.dtype, cu_seq_q[0].item(), cu_seq_q[-1].item()) == (torch.int32, 0, len(query))
    assert max_q == max_k == cu_seq_q.diff().max()
    samples = zip(*(states.split(cu_seq_q.diff().tolist()) for states in (query, key, value)), strict=True)
    outputs = []
    for sample in samples:
        heads = (states.transpose(0, 1) for states in sample)
        settings = {"is_causal": window_size == (-1, 0), "enable_gqa": enable_gqa}
        outputs.append(torch.nn.functional.scaled_dot_product_attention(*heads, **settings).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("fused", [None, Functions(lambda function: function)], ids=["rows", "fused"])
def test_attention_without_padding_changes_nothing(lora_model, loss_and_grads, odd_inputs, fused, monkeypatch):
    parameters = inspect.signature(torch_varlen.varlen_attn).parameters
    assert set(inspect.signature(attend_one_by_one).parameters) <= parameters.keys()
    monkeypatch.setattr(torch_varlen, "varlen_attn", attend_one_by_one)
    expected = loss_and_grads(unwrap(lora_model()), odd_inputs)
    parts = LayerParts(varlen=True, fused=fused)
    assert_same_training(expected, loss_and_grads(packed_copy(lora_model, parts=parts), odd_inputs))


def test_final_hidden_states_are_equal_where_there_is_a_token(lora_model, odd_inputs):
    stock, packed = unwrap(lora_model()), packed_copy(lora_model)
    found, expected = {}, {}
    packed.norm.register_forward_pre_hook(lambda module, args: found.update(hidden=args[0]))
    stock.norm.register_forward_pre_hook(lambda module, args: expected.update(hidden=args[0]))
    with torch.no_grad():
        real = stock(**odd_inputs, use_cache=False).attention_mask.bool()
        packed(**odd_inputs, use_cache=False)
    torch.testing.assert_close(found["hidden"][real], expected["hidden"][real], rtol=1e-5, atol=3e-6)
    assert not found["hidden"][~real].any()


def break_path_choice(monkeypatch):
    monkeypatch.setattr(PackedRows, "split", lambda self, rows: (rows, rows[rows.shape[0] :]))


def break_split_point(monkeypatch):
    monkeypatch.setattr(PackedRows, "split", lambda self, rows: (rows[: self.num_text + 1], rows[self.num_text + 1 :]))


def break_grid(monkeypatch):
    stock = PackedRows.to_cells
    monkeypatch.setattr(PackedRows, "to_cells", lambda self, rows: stock(self, rows).roll(1, dims=0))


def break_rope(monkeypatch):
    monkeypatch.setattr(layer_kernels, "_halves", lambda states: states.chunk(2, dim=-1)[::-1])


def break_causality(monkeypatch):
    def attend(query, key, value):
        heads = (states.transpose(1, 2) for states in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(packed_rows, "sdpa", attend)


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
