"""Gradients of a rank's micro-batches: added up exactly as one by one, in few launches, and checked to be finite."""

import json

import pytest
import torch
from torch import nn

from ds_higgs.training.reduction import GROUP_SIZE, LocalGradients, all_finite
from tests.support import launching

MICRO_BATCHES = 3


def plain_sums(gradients: list[list[torch.Tensor | None]], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """One parameter after the other, one micro-batch after the other, in fp32."""
    sums = []
    for parameter, *given in zip(parameters, *gradients, strict=True):
        total = torch.zeros(parameter.shape)
        for gradient in given:
            if gradient is not None:
                total += gradient.float()
        sums.append(total.to(parameter.dtype))
    return sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_those_of_adding_one_by_one_to_the_bit(dtype):
    shapes = [(3, 5), (7,), (2, 2, 2), (1,)] * (GROUP_SIZE // 2)
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    # The parameter at 1 gets a gradient in the last micro-batch alone, the one at 2 never.
    gradients = [
        [
            None if index == 2 or (index == 1 and number < MICRO_BATCHES - 1) else torch.randn(shape, dtype=dtype)
            for index, shape in enumerate(shapes)
        ]
        for number in range(MICRO_BATCHES)
    ]
    local = LocalGradients(parameters)
    for given in gradients:
        for parameter, gradient in zip(parameters, given, strict=True):
            if gradient is not None:
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
        local.collect()
    assert bool(local.finish())
    expected = plain_sums(gradients, parameters)
    assert all(torch.equal(parameter.grad, one) for parameter, one in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_noticed(value):
    tensors = [torch.full((4, 3), -3e38), torch.zeros(1), torch.full((7,), 3e38, dtype=torch.bfloat16)]
    assert bool(all_finite(tensors))
    tensors[2][3] = value
    assert not bool(all_finite(tensors))


@pytest.mark.costly
def test_a_step_launches_few_kernels_beside_its_passes(tmp_path):
    """DeepSpeed copies each gradient into its bucket, out of it and into its partition, and takes its norm."""
    found = tmp_path / "host.json"
    script = launching.ROOT / "benchmarks" / "host.py"
    done = launching.run_ranks(1, script, "--layers", "2", "--calls", "1", "--output", found)
    assert done.returncode == 0, done.stdout
    result = json.loads(found.read_text())
    one, four = (row["rest_launches"] for row in result["rows"])
    assert one <= 5 * result["settings"]["trained_tensors"] + 120
    assert four <= one + 80
