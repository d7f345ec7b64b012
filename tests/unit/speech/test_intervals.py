"""Intervals over samples, held against scipy's bootstrap; and that models are compared on the same draws."""

import numpy as np
import pytest
import scipy.stats

from ds_higgs.speech import intervals
from ds_higgs.speech.intervals import LEVEL, RESAMPLES, Measured, interval, ratio, resample


@pytest.fixture
def errors() -> np.ndarray:
    """[40, 2]: errors and words of sentences."""
    generator = np.random.default_rng(3)
    words = generator.integers(3, 20, size=40)
    return np.stack([generator.binomial(words, 0.2), words], axis=1).astype(np.float64)


def test_an_interval_is_as_scipys(errors: np.ndarray):
    measured = Measured(errors, {"rate": ratio(0, 1)})
    low, high = interval(measured.resampled["rate"])
    expected = scipy.stats.bootstrap(
        (errors[:, 0], errors[:, 1]),
        lambda edits, length, axis: edits.sum(axis=axis) / length.sum(axis=axis),
        paired=True,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=1,
    ).confidence_interval
    width = expected.high - expected.low
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    assert measured.values() == {"rate": errors[:, 0].sum() / errors[:, 1].sum()}


def test_equally_many_samples_are_drawn_equally_and_every_time(errors: np.ndarray):
    one, other = (Measured(errors + more, {"sum": lambda sums: sums[..., 0]}) for more in (0, 1))
    assert np.array_equal(other.resampled["sum"] - one.resampled["sum"], np.full(RESAMPLES, len(errors)))
    assert np.array_equal(one.resampled["sum"], Measured(errors, one.measures).resampled["sum"])
    assert len(set(one.resampled["sum"])) > 10


def test_many_samples_are_drawn_in_parts(errors: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    at_once = resample(errors)
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 300 * len(errors))  # 2,000 are 6 times 300, and 200
    assert np.array_equal(resample(errors), at_once)


def test_what_nothing_is_known_of_has_no_value():
    nothing = Measured(np.zeros((5, 2)), {"similarity": ratio(0, 1)})
    assert nothing.values() == {}
    assert interval(nothing.resampled["similarity"]) is None
