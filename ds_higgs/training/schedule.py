"""The learning rate over a run, as a factor of its peak."""

import math
from typing import Literal

WARMUP_SHARE = 0.03  # of a run


def count_warmup_steps(wanted: int | Literal["auto"], *, total_steps: int) -> int:
    """Optimizer steps of warm-up: as wanted, or WARMUP_SHARE of the run; of 16 steps and fewer that is none."""
    return round(WARMUP_SHARE * total_steps) if wanted == "auto" else wanted


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Factor for the update that makes optimizer step `step + 1`, in [0, 1].

    Linear from 1 / warmup_steps to 1 over the first `warmup_steps` updates, then by `schedule`: "constant", "linear" or
    "cosine", the last two reaching 0 after `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
