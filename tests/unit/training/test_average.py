"""The average of plain torch weights: where it begins, how it is put in place, and when it stays there."""

from types import SimpleNamespace

import pytest
import torch

from ds_higgs.checkpoint.deepspeed_parts import AVERAGE
from ds_higgs.training.average import Average, forget_average


@pytest.fixture
def engine():
    """Stage 0 in fp32, where DeepSpeed leaves torch's optimizer as it is: two weights at 1, after an update to 0."""
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = torch.optim.AdamW(weights, lr=0.5)
    engine = SimpleNamespace(optimizer=optimizer, weights=weights, zero_optimization_stage=lambda: 0)
    engine.average = Average(engine, 0.9)
    update(engine, step=1)
    return engine


def update(engine, step: int) -> None:
    """Adam's states are there, and the weights are 0."""
    for weight in engine.weights:
        weight.grad = torch.ones_like(weight)
    engine.optimizer.step()
    for weight in engine.weights:
        weight.data.zero_()
    engine.average.update(step)


def assert_all(engine, value: float) -> None:
    for weight in engine.weights:
        torch.testing.assert_close(weight.data, torch.full_like(weight, value))


def test_the_first_updates_forget_faster_than_the_later_ones(engine):
    with engine.average.in_place():
        assert_all(engine, 2 / 11)
    update(engine, step=1000)
    with engine.average.in_place():
        assert_all(engine, 0.9 * 2 / 11)
    assert_all(engine, 0.0)


def test_an_error_of_all_ranks_gives_the_weights_back_and_no_other_does(engine):
    """Giving them back takes all ranks."""

    def fail(error: Exception) -> None:
        with pytest.raises(type(error)), engine.average.in_place(also_after=OSError):
            raise error

    fail(OSError("disk full"))
    assert_all(engine, 0.0)
    fail(ValueError("of one rank"))
    assert_all(engine, 2 / 11)


def test_it_goes_on_from_the_optimizers_state_and_else_from_the_weights(engine):
    again = Average(engine, 0.9)
    with again.in_place():
        assert_all(engine, 2 / 11)
    forget_average(engine)
    assert all(AVERAGE not in engine.optimizer.state[weight] for weight in engine.weights)
    again.take_over()
    with again.in_place():
        assert_all(engine, 0.0)
