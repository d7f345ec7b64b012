"""Which of several models to take: measures with intervals, and whether the best is better sample by sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_higgs.commands.evaluate import BASE, MEASURES, Evaluation
from ds_higgs.errors import UserError
from ds_higgs.job.answers import print_answer
from ds_higgs.losses import LossWeights
from ds_higgs.speech.intervals import LEVEL, Combine, Measured, interval, ratio
from ds_higgs.speech.judging import ERROR_RATES

# What is chosen by where nobody says: what was heard, as far as there are judges.
CHOOSE_BY = ("word_error_rate", "speaker_similarity", "audio_loss")
# Columns of the table on a terminal, which has no room for all.
SHOWN = ("loss", "audio_loss", "word_error_rate", "character_error_rate", "speaker_similarity", "stop_rate")
_AVERAGES = ("speaker_similarity", "code_accuracy", "duration_ratio", "silence_share", "mel_cepstral_distance")
_HEADINGS = {key: heading for key, heading, _ in MEASURES}
_BETTER = {key: better for key, _, better in MEASURES}
CAN_CHOOSE = tuple(
    key
    for key in ("loss", "text_loss", "audio_loss", *ERROR_RATES.values(), "stop_rate", *_AVERAGES)
    if _BETTER[key] is not None
)


@dataclass(frozen=True)
class MeasuredColumn:
    """One model's evaluation, and what its measures are made of: over all samples, and over those that it spoke."""

    evaluation: Evaluation
    measured: tuple[Measured, ...]

    @property
    def name(self) -> str:
        return self.evaluation.name

    def values(self) -> dict[str, float]:
        """The measures that have intervals."""
        return {name: value for one in self.measured for name, value in one.values().items()}

    def resampled(self, name: str) -> np.ndarray | None:
        """A measure's values over drawn samples; None where there is one sample alone."""
        found = next(one for one in self.measured if name in one.measures)
        return found.resampled[name] if len(found.parts) > 1 else None

    def num_samples(self, name: str) -> int:
        return next(len(one.parts) for one in self.measured if name in one.measures)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """By measure, where there are samples enough."""
        found = {name: _interval(self.resampled(name)) for name in self.values()}
        return {name: one for name, one in found.items() if one is not None}

    def as_json(self) -> dict[str, Any]:
        return {**vars(self.evaluation), "intervals": self.intervals()}


@dataclass(frozen=True)
class Difference:
    """What another model's measure is above the chosen one's, on the same samples.

    low, high: its interval; None where there is none. decided: whether that leaves out 0.
    """

    name: str
    difference: float
    low: float | None
    high: float | None
    decided: bool


@dataclass(frozen=True)
class Choice:
    """The model whose measure `by` is best, and what that is worth."""

    by: str
    name: str
    value: float
    num_samples: int
    against: tuple[Difference, ...]

    @property
    def undecided(self) -> tuple[Difference, ...]:
        return tuple(one for one in self.against if not one.decided)


def measure_losses(losses: np.ndarray, weights: LossWeights) -> Measured:
    """The losses of samples, from [samples, 2, 1 + codebooks]: sums and counts, text first."""
    width = losses.shape[2]

    def per_stream(sums: np.ndarray) -> np.ndarray:
        return sums[..., :width] / np.maximum(sums[..., width:], 1)

    def audio(sums: np.ndarray) -> np.ndarray:
        return per_stream(sums)[..., 1:] @ np.array(weights.codebooks)

    return Measured(
        losses.reshape(len(losses), 2 * width),
        {
            "loss": lambda sums: weights.text * per_stream(sums)[..., 0] + weights.audio * audio(sums),
            "text_loss": lambda sums: per_stream(sums)[..., 0],
            "audio_loss": audio,
        },
    )


def measure_speech(rows: Sequence[Mapping[str, Any]]) -> Measured:
    """What was heard of spoken samples, from their rows: errors over all words, averages over those with a value."""
    parts: dict[str, list[tuple[float, float]]] = {"stop_rate": [(row["stopped_by"] == "eos", 1) for row in rows]}
    for errors, rate in ERROR_RATES.items():
        if all(errors in row for row in rows):
            parts[rate] = [(row[errors]["edits"], row[errors]["length"]) for row in rows]
    for name in _AVERAGES:
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            parts[name] = [(0, 0) if value is None else (value, 1) for value in values]
    table = np.array(list(parts.values()), dtype=np.float64)  # [measures, samples, 2]
    measures: dict[str, Combine] = {name: ratio(2 * place, 2 * place + 1) for place, name in enumerate(parts)}
    return Measured(table.transpose(1, 0, 2).reshape(len(rows), -1), measures)


def choose_column(columns: Sequence[MeasuredColumn], *, by: str | None = None) -> Choice:
    """The best of `columns` by one measure, compared with the others on the same samples.

    Args:
        by: one of CAN_CHOOSE; None: the first of CHOOSE_BY that was measured.

    Raises:
        UserError: it was not measured.
    """
    values = {column.name: column.values() for column in columns}
    measured = [name for name in CAN_CHOOSE if all(name in found for found in values.values())]
    wanted = by or next(name for name in CHOOSE_BY if name in measured)
    if wanted not in measured:
        raise UserError(f"--by {wanted}: was not measured; expected one of {', '.join(measured)}")
    sign = 1 if _BETTER[wanted] else -1
    best = max(columns, key=lambda column: sign * values[column.name][wanted])
    return Choice(
        by=wanted,
        name=best.name,
        value=values[best.name][wanted],
        num_samples=best.num_samples(wanted),
        against=tuple(_compare(column, best, wanted) for column in columns if column is not best),
    )


def _compare(other: MeasuredColumn, best: MeasuredColumn, by: str) -> Difference:
    both = other.resampled(by), best.resampled(by)
    found = None if both[0] is None or both[1] is None else interval(both[0] - both[1])
    low, high = found or (None, None)
    decided = low is not None and high is not None and not low <= 0 <= high
    return Difference(other.name, other.values()[by] - best.values()[by], low, high, decided)


def _interval(resampled: np.ndarray | None) -> tuple[float, float] | None:
    return None if resampled is None else interval(resampled)


def format_columns(columns: Sequence[MeasuredColumn], write: Callable[[str], object] = print_answer) -> None:
    """Write the table: a line for each model, a column for each measure of SHOWN with its interval."""
    names = [name for name in SHOWN if any(name in column.values() for column in columns)]
    rows = [["", *(_HEADINGS[name] for name in names)]]
    for column in columns:
        values, intervals = column.values(), column.intervals()
        rows.append([column.name, *(_cell(values.get(name), intervals.get(name)) for name in names)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for first, *cells in rows:
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        write(f"{first:<{widths[0]}}  {'  '.join(padded)}".rstrip())


def _cell(value: float | None, found: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" + ("" if found is None else f" ({found[0]:.4g} to {found[1]:.4g})")


def describe_choice(choice: Choice) -> list[str]:
    """Lines that say which model to take, and against which others that is not decided."""
    samples = f"{choice.num_samples} sample" + "s" * (choice.num_samples != 1)
    lines = [f"by {_HEADINGS[choice.by]} on {samples}: {choice.name}, {choice.value:.4g}"]
    if choice.name == BASE:
        lines.append("no adapter is better than the base")
    if not choice.undecided:
        lines.append(f"every other one is worse, sample by sample ({LEVEL:.0%} intervals of the differences)")
        return lines
    lines.append(f"not decided ({LEVEL:.0%} intervals of the differences, sample by sample):")
    for one in choice.undecided:
        found = "" if one.low is None else f" ({one.low:+.4g} to {one.high:+.4g})"
        lines.append(f"  {one.name} is {one.difference:+.4g} away{found}")
    lines.append("more samples decide more: --count, --manifest")
    return lines
