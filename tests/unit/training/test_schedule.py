"""The learning rate over a run, against values worked out by hand."""

import pytest

from ds_higgs.training.schedule import count_warmup_steps, learning_rate_factor


def factors(schedule, *, steps, warmup_steps=0, total_steps=8):
    return [
        learning_rate_factor(step, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps)
        for step in steps
    ]


def test_cosine_goes_from_one_to_zero_by_half_a_period():
    # 0, 1/4, 1/3, 1/2, 2/3, 3/4 and the whole of 12 steps: (1 + cos) / 2 of 0, 45, 60, 90, 120, 135 and 180 degrees
    half_root = 2**-0.5
    expected = [1, (1 + half_root) / 2, 0.75, 0.5, 0.25, (1 - half_root) / 2, 0]
    assert factors("cosine", steps=[0, 3, 4, 6, 8, 9, 12], total_steps=12) == pytest.approx(expected)


def test_linear_goes_from_one_to_zero_evenly():
    assert factors("linear", steps=[0, 2, 4, 7, 8]) == pytest.approx([1, 0.75, 0.5, 0.125, 0])


def test_constant_stays():
    assert factors("constant", steps=[0, 5, 8, 100]) == [1, 1, 1, 1]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_its_first_update_is_not_zero(schedule):
    assert factors(schedule, steps=range(5), warmup_steps=4, total_steps=12) == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize(("wanted", "total", "steps"), [("auto", 1000, 30), ("auto", 16, 0), (0, 1000, 0), (7, 16, 7)])
def test_warm_up_is_three_hundredths_of_a_run_unless_it_is_given(wanted, total, steps):
    assert count_warmup_steps(wanted, total_steps=total) == steps


def test_what_follows_the_warm_up_takes_the_steps_that_are_left():
    assert factors("cosine", steps=[4, 8, 12], warmup_steps=4, total_steps=12) == pytest.approx([1, 0.5, 0])
    assert factors("linear", steps=[4, 6, 12], warmup_steps=4, total_steps=12) == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_past_the_end_and_a_warm_up_as_long_as_the_run(schedule):
    assert factors(schedule, steps=[9, 1000]) == pytest.approx([0, 0])
    assert factors(schedule, steps=[7, 8], warmup_steps=8) == pytest.approx([1, 1])
