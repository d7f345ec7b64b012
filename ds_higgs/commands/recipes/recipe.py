"""A goal, a card and the data's size, made into a commented YAML configuration."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_higgs.commands.recipes.goals import Card, Goal
from ds_higgs.training.schedule import WARMUP_SHARE

EVALS_PER_EPOCH = 2
MAX_EVAL_STEPS = 500
RELEASED_BASE = "bosonai/higgs-audio-v2-generation-3B-base"


@dataclass(frozen=True)
class Line:
    """One key of a section, with its reason."""

    key: str
    value: Any
    comment: str = ""


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes, as the configuration names it."""

    train: str = "train.json"
    validation: str | None = "val.json"
    output: str = "out"
    base: str = RELEASED_BASE
    cache: str | None = None


@dataclass(frozen=True)
class Plan:
    """The numbers that follow from goal, card and data."""

    samples_per_step: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int


def plan(goal: Goal, *, num_samples: int) -> Plan:
    """Optimizer steps of a training set of `num_samples`."""
    samples_per_step = max(1, min(goal.samples_per_step, num_samples))
    steps_per_epoch = max(1, math.ceil(num_samples / samples_per_step))
    total_steps = steps_per_epoch * goal.epochs
    warmup_steps = max(1, round(WARMUP_SHARE * total_steps))
    eval_steps = min(MAX_EVAL_STEPS, max(1, steps_per_epoch // EVALS_PER_EPOCH))
    return Plan(samples_per_step, steps_per_epoch, total_steps, warmup_steps, eval_steps)


def render(goal: Goal, card: Card, places: Places, *, num_samples: int, opening: Sequence[str], schema: str) -> str:
    """The configuration as YAML text, a reason beside each value that is no default.

    Args:
        opening: comment lines that say what it is for and how it is started.
        schema: path or address of the JSON schema, for editors.
    """
    numbers = plan(goal, num_samples=num_samples)
    lines = [f"# yaml-language-server: $schema={schema}", "#", *(f"# {line}".rstrip() for line in opening)]
    for section, entries in _sections(goal, card, places, numbers).items():
        if entries:
            lines += ["", f"{section}:", *(_rendered(entry) for entry in entries)]
    return "\n".join(lines) + "\n"


def _sections(goal: Goal, card: Card, places: Places, numbers: Plan) -> dict[str, list[Line]]:
    reasons = goal.reasons
    return {
        "run": [
            Line("output_dir", places.output),
            Line("epochs", goal.epochs, reasons["epochs"] if places.validation else ""),
        ],
        "model": _model(card, places),
        "lora": [
            Line("rank", goal.rank, reasons["rank"]),
            Line("alpha", 2 * goal.rank, "twice the rank"),
            Line("dropout", 0.05),
        ],
        "data": _data(card, places),
        "loss": [Line("text_weight", goal.text_weight, reasons["text_weight"])],
        "optim": [
            Line("learning_rate", goal.learning_rate, reasons["learning_rate"]),
            Line("warmup_steps", numbers.warmup_steps, f"3 % of {numbers.total_steps} steps"),
            Line(
                "global_batch_size",
                numbers.samples_per_step,
                "samples in a step, on any number of GPUs",
            ),
        ],
        "zero": [Line("stage", 2), Line("precision", "bf16")],
        "checkpoint": [Line("save_steps", numbers.eval_steps), Line("keep_latest", 2)],
        "eval": _eval(card, places, numbers),
        "logging": [Line("log_steps", 1 if numbers.total_steps < 200 else 10)],
    }


def _model(card: Card, places: Places) -> list[Line]:
    lines = [Line("base", places.base)]
    if card.quantization is not None:
        lines.append(Line("quantization", card.quantization, "the base in 4 bits: it fills the card otherwise"))
    return lines


def _data(card: Card, places: Places) -> list[Line]:
    lines = [Line("train_manifest", places.train)]
    if places.validation is not None:
        lines.append(Line("val_manifest", places.validation))
    if places.cache is not None:
        lines.append(Line("cache_dir", places.cache))
    lines.append(Line("prompt_form", "boson", "as servers ask; as_is where nobody knows what references say"))
    return lines


def _eval(card: Card, places: Places, numbers: Plan) -> list[Line]:
    if places.validation is None:
        return []
    return [
        Line("eval_steps", numbers.eval_steps, f"{numbers.steps_per_epoch} steps are an epoch"),
        Line("num_audio_samples", 4 if card.gib else 2, "loss is not voice: listen to samples/"),
        Line("max_audio_s", 15 if card.gib else 4),
        Line("best_by", "audio_loss", "adapters/best is the one to listen to first"),
        Line("patience", 3, "evaluations without a better one, then the run ends"),
    ]


def _rendered(line: Line) -> str:
    comment = f" # {line.comment}" if line.comment else ""
    return f"  {line.key}: {_scalar(line.value)}{comment}"


def _scalar(value: Any) -> str:
    if isinstance(value, float) and value < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return json.dumps(value, ensure_ascii=False) if not _is_plain(value) else str(value)


def _is_plain(value: Any) -> bool:
    """Whether YAML reads `str(value)` as the value that is meant."""
    if isinstance(value, str):
        return value.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalpha()
    return isinstance(value, int | float) and not isinstance(value, bool)
