"""Projections of one input as one operation, against PEFT's own layers: in fp64, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ds_higgs.model import grouped_lora
from ds_higgs.model.grouped_lora import project

IN, OUT = 12, {"q": 10, "k": 6, "v": 6}
ROWS = (7, 1, 0)


def build_projections(*, dropout: float = 0.0, targets: str = "qkv", **settings) -> list[nn.Module]:
    """Three bias-free linear layers of one input in fp64, `targets` of them with an adapter that is not zero."""
    torch.manual_seed(5)
    model = nn.ModuleDict({name: nn.Linear(IN, size, bias=False) for name, size in OUT.items()})
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=list(targets), **settings)
    adapted = get_peft_model(model, config).double()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return [adapted.get_base_model()[name] for name in OUT]


def run(projections: list[nn.Module], apply: Callable, rows: int) -> list[torch.Tensor]:
    """Outputs and every gradient of a loss over them."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, IN, generator=generator, dtype=torch.float64, requires_grad=True)
    trained = [p for layer in projections for p in layer.parameters() if p.requires_grad]
    torch.manual_seed(1)
    outputs = apply(hidden, projections)
    loss = sum((index + 1) * output.sin().sum() for index, output in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [hidden, *trained])]


def one_by_one(hidden: torch.Tensor, projections: list[nn.Module]) -> list[torch.Tensor]:
    return [projection(hidden) for projection in projections]


def assert_as_peft(projections: list[nn.Module], rows: int) -> None:
    for found, expected in zip(run(projections, project, rows), run(projections, one_by_one, rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def no_grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args):
        raise AssertionError("grouped")

    monkeypatch.setattr(grouped_lora.Group, "apply", refuse)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"targets": "qv"}, {"targets": "k"}], ids=str)
def test_outputs_and_gradients_are_pefts(settings: dict, rows: int):
    assert_as_peft(build_projections(**settings), rows)


def test_a_single_projection_and_an_input_that_needs_no_gradient():
    projections = build_projections()[:1]
    assert_as_peft(projections, 7)
    (output,) = project(torch.ones(2, IN, dtype=torch.float64), projections)
    output.sum().backward()
    assert all(weight.grad is not None for weight in projections[0].parameters() if weight.requires_grad)


def forget_the_scaling(monkeypatch):
    monkeypatch.setattr(grouped_lora, "_scaled_product", lambda left, right, scaling: left @ right)


def forget_the_adapters_gradient(monkeypatch):
    monkeypatch.setattr(
        grouped_lora, "_grad_through_adapters", lambda low, down, *mask, keep: down.new_zeros(len(low), down.shape[1])
    )


def forget_the_other_bases(monkeypatch):
    monkeypatch.setattr(
        grouped_lora, "_grad_through_bases", lambda grads, weights, onto: onto.addmm_(grads[0], weights[0])
    )


@pytest.mark.parametrize(
    "break_it",
    [forget_the_scaling, forget_the_adapters_gradient, forget_the_other_bases],
    ids=lambda function: function.__name__,
)
def test_the_comparison_notices_what_is_broken(break_it, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        assert_as_peft(build_projections(), 7)


def test_gradients_with_dropout_are_those_of_the_outputs():
    projections = build_projections(dropout=0.4)
    hidden = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    adapters = [weight for layer in projections for weight in layer.parameters() if weight.requires_grad]

    def apply(hidden, *_):
        torch.manual_seed(2)  # the same mask at every call
        return tuple(project(hidden, projections))

    assert torch.autograd.gradcheck(apply, (hidden, *adapters))


def test_dropout_keeps_the_expectation_and_has_its_rate():
    projections = build_projections(dropout=0.25)
    for layer in projections:  # y = s * drop(x)[:3]
        nn.init.zeros_(layer.base_layer.weight)
        nn.init.eye_(layer.lora_A["default"].weight)
        nn.init.eye_(layer.lora_B["default"].weight)
    hidden = torch.ones(20_000, IN, dtype=torch.float64)
    torch.manual_seed(0)
    outputs = [output[:, :3] for output in project(hidden, projections)]
    scaling = projections[0].scaling["default"]
    for output in outputs:
        assert output.unique().tolist() == pytest.approx([0.0, scaling / 0.75])
        assert (output == 0).double().mean().item() == pytest.approx(0.25, abs=0.005)
        assert output.mean().item() == pytest.approx(scaling, rel=0.01)
        assert torch.equal(output, outputs[0])  # one mask for all
    for layer in projections:
        layer.eval()
    assert project(hidden, projections)[0][:, :3].unique().tolist() == pytest.approx([scaling])


def with_dora() -> list[nn.Module]:
    return build_projections(use_dora=True)


def merged() -> list[nn.Module]:
    projections = build_projections()
    for layer in projections:
        layer.merge()
    return projections


def disabled() -> list[nn.Module]:
    projections = build_projections()
    for layer in projections:
        layer.enable_adapters(False)
        layer.base_layer.weight.requires_grad_()
    return projections


def with_a_trained_base() -> list[nn.Module]:
    projections = build_projections()
    for layer in projections:
        layer.base_layer.weight.requires_grad_()
    return projections


def of_another_linear_class() -> list[nn.Module]:
    projections = build_projections()
    for layer in projections:
        layer.base_layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    return projections


def split_by_zero_3() -> list[nn.Module]:
    projections = build_projections()
    for layer in projections:
        layer.base_layer.weight.ds_id = 0
    return projections


@pytest.mark.parametrize(
    "build",
    [with_dora, disabled, with_a_trained_base, of_another_linear_class, split_by_zero_3],
    ids=lambda function: function.__name__,
)
def test_other_layers_keep_pefts_way(no_grouping, build):
    assert_as_peft(build(), 7)


def test_merged_adapters_are_not_added_twice(no_grouping):
    hidden = torch.ones(2, IN, dtype=torch.float64)
    for found, expected in zip(project(hidden, merged()), one_by_one(hidden, build_projections()), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("no_grouping")
def test_adapters_of_unequal_scaling_keep_pefts_way():
    projections = build_projections()
    projections[1].scaling["default"] *= 2
    assert_as_peft(projections, 7)


def test_the_grouping_is_used_otherwise(no_grouping):
    with pytest.raises(AssertionError, match="grouped"):
        assert_as_peft(build_projections(), 7)
