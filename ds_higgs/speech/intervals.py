"""How sure a measure over samples is: intervals by bootstrap, on the same draws for every model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_DRAWN_AT_ONCE = 4_000_000  # numbers: 32 MB

# Sums over many samples [..., parts] -> the measure of them together [...]; NaN where there is none.
Combine = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What a model did with each of some samples, at least two: one alone says nothing of others.

    parts: [samples, parts] float64, such as errors and words.
    measures: by name, what is made of sums of the parts.
    """

    parts: np.ndarray
    measures: Mapping[str, Combine]

    def values(self) -> dict[str, float]:
        """Of all samples together; a measure that nothing is known of is left out."""
        found = {name: float(combine(self.parts.sum(axis=0))) for name, combine in self.measures.items()}
        return {name: value for name, value in found.items() if np.isfinite(value)}

    @cached_property
    def resampled(self) -> dict[str, np.ndarray]:
        """Of RESAMPLES sets of as many samples, drawn with replacement: [RESAMPLES] by name.

        Equally many samples are drawn equally, so that two models' values are paired.
        """
        sums = resample(self.parts)
        return {name: combine(sums) for name, combine in self.measures.items()}


def ratio(numerator: int, denominator: int) -> Combine:
    """The measure that is one part over another; NaN over 0."""

    def divide(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums[..., numerator] / sums[..., denominator]

    return divide


def resample(parts: np.ndarray) -> np.ndarray:
    """[RESAMPLES, parts]: sums over samples drawn with replacement out of [samples, parts]."""
    generator = np.random.default_rng(0)
    count = len(parts)
    at_once = max(1, _DRAWN_AT_ONCE // count)
    sums = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        sums.append(generator.multinomial(count, np.full(count, 1 / count), size=size) @ parts)
    return np.concatenate(sums)


def interval(resampled: np.ndarray) -> tuple[float, float] | None:
    """The middle LEVEL of the values; None where there are none."""
    known = resampled[np.isfinite(resampled)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
