"""Curves for the page, thinned so that a long run stays a small file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ds_higgs.adapters.record import LOSSES
from ds_higgs.training.stop_and_onset import ALL_AVERAGES

MAX_POINTS = 1200
# Keys of "step" lines that are drawn.
STEP_CURVES = (
    "loss",
    "text_loss",
    "audio_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "samples_per_second",
    "peak_memory_gib",
)
# Keys of "eval" lines that are drawn: the losses, and what is known of ends and onsets.
EVAL_CURVES = (*LOSSES, *ALL_AVERAGES)
SAMPLE_MEASURES = (
    "seconds",
    "duration_ratio",
    "silence_share",
    "mel_cepstral_distance",
    "code_accuracy",
    "speaker_similarity",
)
SAMPLE_CURVES = (
    "word_error_rate",
    "character_error_rate",
    "speaker_similarity",
    "code_accuracy",
    "stop_rate",
    "duration_ratio",
    "silence_share",
    "mel_cepstral_distance",
)

Point = tuple[float, float | None]


def read_curve(lines: Sequence[Mapping[str, Any]], key: str, index: int | None = None) -> list[Point]:
    """(step, value) of every line that has `key` (its element `index`, of a list), thinned.

    A value that is not finite is None: a gap in the curve.
    """
    points = []
    for line in lines:
        value = line.get(key)
        if index is not None and isinstance(value, list):
            value = value[index] if index < len(value) else None
        points.append((float(line["step"]), finite(value)))
    return [] if all(value is None for _, value in points) else thin(points)


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: means over runs of neighbours, gaps kept where a whole run has no value."""
    if len(points) <= most:
        return [(step, _rounded(value)) for step, value in points]
    size = math.ceil(len(points) / most)
    return [_mean(points[start : start + size]) for start in range(0, len(points), size)]


def _mean(points: Sequence[Point]) -> Point:
    values = [value for _, value in points if value is not None]
    step = sum(step for step, _ in points) / len(points)
    return round(step, 1), _rounded(sum(values) / len(values)) if values else None


def finite(value: Any) -> float | None:
    """A number that JSON can hold; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    """Six significant digits: more than a screen can show."""
    return None if value is None else float(f"{value:.6g}")
