"""The frozen base's products in fp8, on the CPU's kernels: near the exact ones, row by row, forward and backward."""

import pytest
import torch
from torch import nn

from ds_higgs.model.fp8 import Fp8Linear, use_fp8
from ds_higgs.model.loading import load_model
from ds_higgs.model.lora import apply_lora, unwrap


def frozen(rows: int, columns: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16).requires_grad_(False)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    return (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-20)


def test_output_and_gradient_are_near_the_exact_ones_row_by_row():
    """Rows of very different sizes: one scale for all of them would round the small ones to nothing."""
    linear = frozen(48, 64)
    hidden = (torch.randn(37, 64) * torch.logspace(-6, 6, 37)[:, None]).bfloat16()
    made, results = Fp8Linear.like(linear), []
    for layer in (linear, made):
        leaf = hidden.clone().requires_grad_()
        output = layer(leaf)
        (grad,) = torch.autograd.grad(output, leaf, torch.randn(37, 48).bfloat16() * 0 + hidden[:, :48])
        results.append((output, grad))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        assert 0.005 < relative_error(found, expected).max() < 0.06
    assert made.weight is linear.weight


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (2, 3, 64)], ids=str)
def test_any_shape_of_rows(shape: tuple[int, ...]):
    output = Fp8Linear.like(frozen(32, 64))(torch.ones(shape, dtype=torch.bfloat16))
    assert output.shape == (*shape[:-1], 32)
    assert output.isfinite().all()


def test_a_weight_that_changes_is_cast_again():
    made = Fp8Linear.like(frozen(32, 64))
    hidden = torch.ones(2, 64, dtype=torch.bfloat16)
    before = made(hidden)
    made.weight.mul_(2)
    torch.testing.assert_close(made(hidden), 2 * before)


@pytest.mark.parametrize("odd_inputs", ["unequal_lengths", "no_audio"], indirect=True)
def test_a_model_learns_through_it(tiny_base, odd_inputs, loss_and_grads):
    """The adapters' gradients are those of bf16 but for the rounding; the base has none."""
    found = {}
    for quantization in (None, "fp8"):
        model = load_model(tiny_base, dtype=torch.bfloat16, quantization=quantization)
        layers = [type(module) for module in model.layers.modules() if isinstance(module, nn.Linear)]
        assert set(layers) == {Fp8Linear if quantization else nn.Linear}
        torch.manual_seed(1)
        model = apply_lora(model, rank=4, alpha=8, dropout=0.0, targets=("attention", "text_ffn", "audio_ffn"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        _, grads = loss_and_grads(unwrap(model), odd_inputs)
        found[quantization] = torch.cat([grad.flatten().float() for grad in grads.values() if grad is not None])
        assert not any("base_layer" in name for name in grads)
    similarity = torch.cosine_similarity(found[None], found["fp8"], dim=0)
    assert 0.9 < similarity < 0.99999


def test_layers_of_other_sizes_stay_as_they_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(frozen(32, 24), frozen(32, 64))])

    model = Model()
    use_fp8(model)
    assert [type(layer) for layer in model.layers[0]] == [nn.Linear, Fp8Linear]
