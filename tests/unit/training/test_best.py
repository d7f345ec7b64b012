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


def test_voices_get_better_upwards_and_errors_downwards():
    assert feed(Best("speaker_similarity", patience=2), [0.1, 0.2, 0.15]) == [True, True, False]
    assert feed(Best("word_error_rate", patience=2), [0.5, 0.2, 0.3]) == [True, True, False]


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


def test_another_judge_begins_anew():
    best = Best("word_error_rate", patience=3, judge="whisper, arabic")
    feed(best, [0.5, 0.4])
    same, other = (Best("word_error_rate", patience=3, judge=judge) for judge in ("whisper, arabic", "whisper"))
    same.load_state_dict(best.state_dict())
    other.load_state_dict(best.state_dict())
    assert (same.value, other.value) == (0.4, None)


def test_the_average_begins_anew():
    trained, average = Best("loss", patience=3), Best("loss", patience=3, weights="ema")
    feed(trained, [2.0])
    average.load_state_dict(trained.state_dict())
    assert average.value is None


def test_it_goes_on_from_what_knew_neither_judges_nor_averages():
    kept = ("measure", "patience", "value", "step", "since")
    before = {key: value for key, value in Best("loss", patience=3, value=2.0).state_dict().items() if key in kept}
    resumed = Best("loss", patience=3)
    resumed.load_state_dict(before)
    assert resumed.value == 2.0
