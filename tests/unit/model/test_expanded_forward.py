"""The sequence expanded on the CPU against the model's own merging: equal values, losses and gradients, to the bit."""

import pickle

import pytest
import torch
from boson_multimodal.model.higgs_audio.utils import merge_input_ids_with_audio_features
from torch.utils._python_dispatch import TorchDispatchMode

from ds_higgs.batch import ModelInputs
from ds_higgs.layout import ExpandedSequence, expand, order_rows
from ds_higgs.model.expanded_forward import _merge, expanded_sequence, forward_label_free
from ds_higgs.model.heads import deferred_heads
from ds_higgs.model.loading import read_model_config
from ds_higgs.model.lora import unwrap
from ds_higgs.model.packed_rows import enable_packed_rows

WIDTH = 3


@pytest.fixture
def config(tiny_base):
    return read_model_config(tiny_base)


def lengths(inputs: ModelInputs, kind: str) -> torch.Tensor:
    starts, frames = inputs[f"audio_{kind}_ids_start"], inputs[f"audio_{kind}_ids"].shape[-1]
    return torch.tensor([*starts.tolist(), frames], dtype=torch.int64).diff()


def expand_inputs(config, inputs: ModelInputs) -> ExpandedSequence:
    return expand(
        inputs["input_ids"],
        inputs["attention_mask"],
        audio_in_lengths=lengths(inputs, "in"),
        audio_out_lengths=lengths(inputs, "out"),
        placeholder_ids=(config.audio_in_token_idx, config.audio_out_token_idx),
        pad_id=config.pad_token_id,
    )


def merge(function, config, inputs: ModelInputs) -> tuple:
    """What `function` merges of random embeddings."""
    torch.manual_seed(0)
    text = torch.randn(*inputs["input_ids"].shape, WIDTH)
    audio_in, audio_out = (torch.randn(inputs[f"audio_{kind}_ids"].shape[-1], WIDTH) for kind in ("in", "out"))
    return function(
        None,
        None,
        audio_in,
        inputs["audio_in_ids_start"],
        audio_out,
        inputs["audio_out_ids_start"],
        config.audio_in_token_idx,
        config.audio_out_token_idx,
        text,
        inputs["input_ids"],
        inputs["attention_mask"],
        None,
        pad_token_id=config.pad_token_id,
        round_to=8,
        left_padding=inputs["input_ids"].shape[0] == 1,
    )


def assert_merged_alike(config, inputs: ModelInputs, expanded: ExpandedSequence) -> None:
    expected = merge(merge_input_ids_with_audio_features, config, inputs)
    found = merge(lambda *args, **settings: _merge(expanded, *args, **settings), config, inputs)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or (one.dtype == other.dtype and torch.equal(one, other))


def test_everything_is_as_the_model_merges_it(config, odd_inputs):
    expanded = expand_inputs(config, odd_inputs)
    assert_merged_alike(config, odd_inputs, expanded)
    order = order_rows(expanded.attention_mask, expanded.audio_in_mask | expanded.audio_out_mask, expanded.position_ids)
    assert all(
        torch.equal(torch.as_tensor(getattr(expanded, name)), torch.as_tensor(v)) for name, v in vars(order).items()
    )


def test_a_padded_end_is_cut_as_the_model_cuts_it(config):
    """Tokens without attention at the end, more than the padding to 8 takes."""
    ids = torch.arange(2 * 20).view(2, 20) % 7
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    none = torch.zeros(0, dtype=torch.int64)
    codes = torch.zeros(8, 0, dtype=torch.int64)
    inputs = ModelInputs(
        input_ids=ids,
        attention_mask=mask,
        audio_in_ids=codes,
        audio_out_ids=codes,
        audio_in_ids_start=none,
        audio_out_ids_start=none,
    )
    expanded = expand_inputs(config, inputs)
    assert expanded.input_ids.shape == (2, 8)
    assert_merged_alike(config, inputs, expanded)


@pytest.mark.parametrize("odd_inputs", ["unequal_lengths", "one_left_padded"], indirect=True)
def test_the_comparison_notices_a_row_in_another_place(config, odd_inputs):
    expanded = expand_inputs(config, odd_inputs)
    expanded.cells[:2] = expanded.cells[:2].flip(0)
    with pytest.raises(AssertionError):
        assert_merged_alike(config, odd_inputs, expanded)


def loss_and_grads(model, inputs: ModelInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    torch.manual_seed(0)
    outputs = forward_label_free(model, inputs)
    loss = outputs.logits[outputs.attention_mask.bool()].logsumexp(-1).square().mean()
    loss = loss + outputs.audio_logits.logsumexp(-1).square().sum() / 50
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("packed", [True, False])
def test_losses_and_gradients_are_equal_to_the_bit(lora_model, config, odd_inputs, packed: bool):
    results = []
    for expanded in (None, expand_inputs(config, odd_inputs)):
        model = unwrap(lora_model())
        if packed:
            enable_packed_rows(model)
        results.append(loss_and_grads(model, ModelInputs(expanded=expanded, **odd_inputs)))
        assert expanded_sequence(model) is None  # for this forward alone
    (expected_loss, expected), (loss, grads) = results
    assert torch.equal(loss, expected_loss)
    for name, grad in expected.items():  # without audio, the embeddings' gradient is zero rather than none
        assert torch.equal(grads[name], torch.zeros_like(grads[name]) if grad is None else grad), name


def test_nothing_waits_for_the_device(lora_model, config, odd_inputs):
    class Waits(TorchDispatchMode):
        found: tuple[str, ...] = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            indices = args[1] if str(func).startswith(("aten.index.", "aten.index_put")) else ()
            by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
            if by_mask or func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
                self.found += (str(func),)
            return func(*args, **(kwargs or {}))

    model = unwrap(lora_model())
    enable_packed_rows(model)
    inputs = ModelInputs(expanded=expand_inputs(config, odd_inputs), **odd_inputs)
    with torch.no_grad(), deferred_heads(model), Waits() as waits:
        forward_label_free(model, inputs)
    assert not waits.found


def test_the_sequence_travels_with_the_inputs(config, odd_inputs):
    expanded = expand_inputs(config, odd_inputs)
    inputs = ModelInputs(expanded=expanded, **odd_inputs)
    for copy in (pickle.loads(pickle.dumps(inputs)), inputs.to("cpu")):
        assert set(copy) == set(odd_inputs)  # it is no argument of the model's forward
        for name, value in vars(expanded).items():
            assert torch.equal(torch.as_tensor(getattr(copy.expanded, name)), torch.as_tensor(value)), name
