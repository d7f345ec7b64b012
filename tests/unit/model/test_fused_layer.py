"""The fused layer against the stock one and finite differences, its masks, and what torch.compile makes of it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch._inductor import config as inductor_config
from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler
from torch.utils._pytree import tree_leaves

from ds_higgs.model import fused_functions, fused_layer
from ds_higgs.model.activation_checkpointing import enable_activation_checkpointing
from ds_higgs.model.fused_functions import Dropout, Norm, draw_seeds, keep_mask
from ds_higgs.model.fused_layer import Cells, Functions
from ds_higgs.model.lora import unwrap
from ds_higgs.model.packed_rows import LayerParts, enable_packed_rows
from tests.support.gradients import assert_same_training

AS_THEY_ARE = Functions(lambda function: function)


def fused_copy(lora_model, *, dropout: float = 0.0, checkpoint_every: int | None = None, functions=AS_THEY_ARE):
    model = unwrap(lora_model(dropout))
    enable_packed_rows(model, parts=LayerParts(fused=functions))
    if checkpoint_every:
        enable_activation_checkpointing(model, every=checkpoint_every)
    return model


def test_loss_and_gradients_are_those_of_the_stock_layers(lora_model, loss_and_grads, odd_inputs):
    expected = loss_and_grads(unwrap(lora_model()), odd_inputs)
    assert_same_training(expected, loss_and_grads(fused_copy(lora_model), odd_inputs))


def forget_the_residual(monkeypatch):
    backward = fused_functions.norm_rows_backward
    monkeypatch.setattr(
        AS_THEY_ARE, "norm_rows_backward", lambda grad_sum, *rest: backward(torch.zeros_like(grad_sum), *rest)
    )


def forget_the_adapter(monkeypatch):
    backward = fused_functions.swiglu_backward
    monkeypatch.setattr(AS_THEY_ARE, "swiglu_backward", lambda grad, dropped, *rest: backward(grad, None, *rest))


def swap_the_norms(monkeypatch):
    first = fused_layer._first_norms
    monkeypatch.setattr(fused_layer, "_first_norms", lambda layer: first(layer)[::-1])


def rotate_forwards_again(monkeypatch):
    monkeypatch.setattr(AS_THEY_ARE, "collect_rotated_back", fused_functions.spread_rotated)


@pytest.mark.parametrize(
    "break_it",
    [forget_the_residual, forget_the_adapter, swap_the_norms, rotate_forwards_again],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("odd_inputs", ["one_left_padded"], indirect=True)
def test_the_comparison_notices_what_is_broken(lora_model, loss_and_grads, odd_inputs, break_it, monkeypatch):
    dropout = 0.5 if break_it is forget_the_adapter else 0.0
    expected = loss_and_grads(fused_copy(lora_model, dropout=dropout), odd_inputs)
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_training(expected, loss_and_grads(fused_copy(lora_model, dropout=dropout), odd_inputs))


@pytest.mark.parametrize("odd_inputs", ["unequal_lengths"], indirect=True)
def test_other_projections_keep_pefts_way(lora_model, loss_and_grads, odd_inputs, monkeypatch):
    monkeypatch.setattr(fused_layer, "find_group", lambda hidden, projections: None)
    expected = loss_and_grads(unwrap(lora_model()), odd_inputs)
    assert_same_training(expected, loss_and_grads(fused_copy(lora_model), odd_inputs))


@pytest.mark.parametrize("odd_inputs", ["unequal_lengths"], indirect=True)
def test_norms_that_learn_are_not_fused(lora_model, loss_and_grads, odd_inputs):
    models = unwrap(lora_model()), fused_copy(lora_model)
    for model in models:
        model.layers[0].audio_input_layernorm.weight.requires_grad_()
    expected, found = (loss_and_grads(model, odd_inputs) for model in models)
    assert_same_training(expected, found)
    assert found[1]["layers.0.audio_input_layernorm.weight"] is not None


@pytest.mark.parametrize("odd_inputs", ["several_segments", "no_audio"], indirect=True)
def test_recomputed_layers_are_bit_equal_with_dropout(lora_model, loss_and_grads, odd_inputs):
    expected_loss, expected = loss_and_grads(fused_copy(lora_model, dropout=0.3), odd_inputs)
    loss, grads = loss_and_grads(fused_copy(lora_model, dropout=0.3, checkpoint_every=1), odd_inputs)
    assert torch.equal(loss, expected_loss)
    assert all(grad is None or torch.equal(grads[name], grad) for name, grad in expected.items())
    without, _ = loss_and_grads(fused_copy(lora_model), odd_inputs)
    assert not torch.equal(loss, without)


@pytest.mark.parametrize("odd_inputs", ["unequal_lengths"], indirect=True)
def test_evaluation_draws_no_random_numbers(lora_model, odd_inputs):
    model = fused_copy(lora_model, dropout=0.3).eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        model(**odd_inputs, use_cache=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("odd_inputs", ["unequal_lengths"], indirect=True)
def test_torch_compile_takes_every_function_whole(lora_model, loss_and_grads, odd_inputs):
    torch._dynamo.reset()
    compiled = Functions(partial(torch.compile, fullgraph=True, backend="eager"))
    expected = loss_and_grads(fused_copy(lora_model, dropout=0.3), odd_inputs)
    assert_same_training(expected, loss_and_grads(fused_copy(lora_model, dropout=0.3, functions=compiled), odd_inputs))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def dropout(place: int, rate: float = 0.4) -> Dropout:
    torch.manual_seed(place)
    return Dropout(draw_seeds(1, device=torch.device("cpu"))[0], rate)


def places() -> Cells:
    """Five rows, in a grid of two samples with four cells each."""
    row_of_cell = torch.tensor([0, 3, -1, -1, 2, 1, 4, -1])
    rope = random(5, 6, seed=8).detach(), random(5, 6, seed=9).detach()
    return Cells((2, 3), row_of_cell, torch.tensor([0, 5, 4, 1, 6]), rope)


def norm_settings(joint: bool, *rates: float | None) -> fused_layer._NormSettings:
    norms = tuple(Norm(random(6, seed=seed).detach(), 1e-5) for seed in (1, 2))
    dropouts = tuple(None if rate is None else dropout(place, rate) for place, rate in enumerate(rates))
    return fused_layer._NormSettings(AS_THEY_ARE, norms, dropouts, joint)


def norm_of(settings: fused_layer._NormSettings) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The outputs that are tensors, by the tensors that have gradients."""

    def apply(hidden: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        outputs = fused_layer._Norm.apply(hidden, added, (2, 3), settings)
        return tuple(output for output in outputs if output is not None)

    return apply


def in_valid_cells(cells: torch.Tensor) -> torch.Tensor:
    """Nothing comes back from the padding, as nothing looks there."""
    return cells * (places().row_of_cell >= 0).view(-1, *[1] * (cells.dim() - 1))


GRADIENTS = {
    "norm": (norm_of(norm_settings(True, 0.4, 0.4)), [(5, 6)]),
    "norm of a sum": (norm_of(norm_settings(False, 0.4, 0.4)), [(5, 6), (5, 6)]),
    "norm, one path": (norm_of(norm_settings(False, None, 0.4)), [(5, 6), (5, 6)]),
    "norm, no dropout": (norm_of(norm_settings(False, None, None)), [(5, 6), (5, 6)]),
    "swiglu": (lambda gate, up: fused_layer._SwiGLU.apply(gate, up, AS_THEY_ARE, dropout(1)), [(5, 6), (5, 6)]),
    "rotated": (
        lambda rows: in_valid_cells(fused_layer._IntoCells.apply(rows, places(), AS_THEY_ARE, True)),
        [(5, 2, 6)],
    ),
    "into cells": (
        lambda rows: in_valid_cells(fused_layer._IntoCells.apply(rows, places(), AS_THEY_ARE, False)),
        [(5, 2, 6)],
    ),
    "from cells": (lambda cells: fused_layer._FromCells.apply(cells, places(), AS_THEY_ARE, dropout(2)), [(8, 6)]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_finite_differences(name: str):
    function, shapes = GRADIENTS[name]
    inputs = tuple(random(*shape, seed=seed) for seed, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(function, inputs)


def test_masks_have_their_rate_and_know_nothing_of_each_other():
    shape, device = torch.Size((600, 700)), torch.device("cpu")
    masks = [keep_mask(shape, dropout(place, 0.05), device).double() for place in range(6)]
    expected, deviation = 0.95, (0.95 * 0.05 / shape.numel()) ** 0.5
    assert all(abs(mask.mean() - expected) < 5 * deviation for mask in masks)
    # Rows, columns, neighbours and other places: no correlation beyond what chance gives.
    mask = masks[0]
    assert mask.mean(dim=0).std() == pytest.approx((0.95 * 0.05 / shape[0]) ** 0.5, rel=0.1)
    assert mask.mean(dim=1).std() == pytest.approx((0.95 * 0.05 / shape[1]) ** 0.5, rel=0.1)
    others = [mask.roll(1, 0), mask.roll(1, 1), mask.flatten().roll(2).view(shape), *masks[1:]]
    correlations = [torch.corrcoef(torch.stack([mask.flatten(), other.flatten()]))[0, 1] for other in others]
    assert max(abs(value) for value in correlations) < 5 / shape.numel() ** 0.5


def test_a_mask_is_the_same_by_rows():
    rows, settings = torch.tensor([4, 0, 2]), dropout(3)
    whole, some = (keep_mask(torch.Size((n, 7)), settings, rows.device, at) for n, at in ((5, None), (3, rows)))
    assert torch.equal(some, whole[rows])


class _Planned(Exception):
    """torch.compile has decided which kernels to make."""


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, float]]:
    """Kernels that torch.compile would make of a function, and the bytes they move over those of its tensors."""
    seen = []

    def plan(scheduler: Scheduler) -> None:
        kernels = [node for node in scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        seen.append((len(kernels), sum(kernel.get_read_write_buffers_sizes() for kernel in kernels)))
        raise _Planned

    monkeypatch.setattr(Scheduler, "codegen", plan)
    monkeypatch.setattr(inductor_config, "fx_graph_cache", False)

    def run(function: Callable, *arguments) -> tuple[int, float]:
        torch._dynamo.reset()
        with pytest.raises(Exception, match="_Planned"), torch.no_grad():
            torch.compile(function, fullgraph=True)(*arguments)
        tensors = [leaf for leaf in tree_leaves((arguments, function(*arguments))) if isinstance(leaf, torch.Tensor)]
        kernels, moved = seen[-1]
        return kernels, moved / sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    return run


def rows_of(width: int, count: int = 96) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.bfloat16)


def compiled_cases() -> dict[str, tuple]:
    """Arguments of every function, and how often its tensors are passed over; by norms twice, then out of the cache."""
    norm, slot = Norm(rows_of(64)[0], 1e-5), torch.randperm(112)[:96]
    row_of_cell = torch.full((112,), -1).index_copy(0, slot, torch.arange(96))
    heads, rope = rows_of(64).view(96, 2, 32), (rows_of(32), rows_of(32))
    return {
        "norm_rows": ([rows_of(64) for _ in range(2)], norm, dropout(1), [rows_of(64) for _ in range(4)], 1.67),
        "norm_rows_backward": ([rows_of(64) for _ in range(4)], norm, dropout(1), [rows_of(64)], 1.25),
        "swiglu": ([rows_of(160), rows_of(160), dropout(1)], 1),
        "swiglu_backward": ([rows_of(160) for _ in range(4)], dropout(1), 1),
        "spread": ([heads, row_of_cell], 1),
        "spread_rotated": ([heads, *rope, row_of_cell], 1),
        "collect": ([rows_of(64, 112), slot], 1),
        "collect_rotated_back": ([rows_of(64, 112).view(112, 2, 32), *rope, slot], 1),
        "collect_dropped": ([rows_of(64, 112), slot, dropout(1)], 1),
        "collect_dropped_backward": ([rows_of(64), rows_of(64), row_of_cell, dropout(1)], 1),
    }


QUICK = ("norm_rows", "swiglu_backward", "collect_dropped_backward")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in compiled_cases()]
)
def test_torch_compile_makes_one_kernel_that_passes_over_each_tensor_once(planned, name: str):
    """What the simulation takes it for; by torch's own plan for a CPU, without compiling it."""
    *arguments, passes = compiled_cases()[name]
    flat = [one for part in arguments for one in (part if isinstance(part, list) else [part])]
    kernels, ratio = planned(getattr(fused_functions, name), *flat)
    assert kernels == 1
    assert ratio <= passes + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("odd_inputs", ["unequal_lengths"], indirect=True)
def test_compiled_kernels_compute_the_same(lora_model, loss_and_grads, odd_inputs):
    torch._dynamo.reset()
    expected = loss_and_grads(fused_copy(lora_model, dropout=0.3), odd_inputs)
    compiled = fused_copy(lora_model, dropout=0.3, functions=fused_layer.compiled_functions())
    assert_same_training(expected, loss_and_grads(compiled, odd_inputs))


def test_every_lora_layer_is_grouped(lora_model, monkeypatch, loss_and_grads, request):
    """None runs by itself: the dropout of one that did would not be this layer's."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("by itself")

    monkeypatch.setattr(LoraLinear, "forward", refuse)
    model = fused_copy(lora_model, dropout=0.3)
    hidden = torch.randn(5, model.config.text_config.hidden_size)
    heads = model.layers[0].self_attn.head_dim
    rows = places()._replace(rope=(torch.randn(5, heads), torch.randn(5, heads)))
    seeds = draw_seeds(fused_layer.PLACES, device=hidden.device)
    fused = fused_layer.FusedLayer(AS_THEY_ARE, rows, lambda query, key, value: query, seeds)
    assert fused(model.layers[0], hidden).shape == hidden.shape
