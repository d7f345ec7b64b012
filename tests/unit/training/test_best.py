"""The best evaluation of a run and its patience."""

import math

import pytest

from ds_higgs.training.best import Best


def feed(best: Best, values: list[float]) -> list[bool]:
    return [best.update({best.measure: value}, step=step) for step, value in enumerate(values)]


def test_losses_get_better_downwards():
    best = Best("audio_loss", patience=2)
    assert feed(best, [5.0, 4.0, 4.0, 4.5]) == [True, True, False, False]
    assert (best.value, best.step, best.since) == (4.0, 1, 2)
    assert best.is_over


def test_accuracy_gets_better_upwards():
    best = Best("code_accuracy", patience=2)
    assert feed(best, [0.1, 0.2, 0.15, 0.3]) == [True, True, False, True]
    assert not best.is_over


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_no_best(broken: float):
    best = Best("loss", patience=1)
    assert feed(best, [broken, 3.0]) == [False, True]


def test_other_evaluations_do_not_count():
    best = Best("stop_rate", patience=1)
    assert not best.update({"audio_loss": 1.0}, step=1)
    assert not best.update({"stop_rate": None}, step=1)
    assert best.since == 0
    nothing = Best(None, patience=None)
    assert not nothing.update({"audio_loss": 1.0}, step=1)
    assert not nothing.is_over


def test_it_goes_on_from_a_checkpoint_unless_the_measure_changed():
    best = Best("loss", patience=3)
    feed(best, [2.0, 3.0])
    resumed, other = Best("loss", patience=3), Best("audio_loss", patience=3)
    resumed.load_state_dict(best.state_dict())
    other.load_state_dict(best.state_dict())
    assert resumed == best
    assert other == Best("audio_loss", patience=3)
