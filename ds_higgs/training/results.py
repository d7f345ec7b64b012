"""What a step or a validation found: sums and counts of the global batch divided, in one place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_higgs.losses import LossWeights


@dataclass(frozen=True)
class Divergence:
    """KL(base || model) in nats per target; None where `loss.keep_base` does not ask for it."""

    text: float | None
    audio: float | None

    @property
    def total(self) -> float:
        return (self.text or 0.0) + (self.audio or 0.0)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over the global batch: every number is over all ranks and accumulation steps.

    Losses are in nats per target, `audio_loss_per_codebook` one per codebook; `grad_norm` is before clipping.
    applied: False where the update was left out because a loss or a gradient was not finite.
    extra: the caller's values, summed over ranks.
    per_source: the losses of each source alone.
    keep_base: the divergence from the base, whose weighted value is in `loss`; None where none is taken.
    """

    loss: float
    text_loss: float
    audio_loss: float
    audio_loss_per_codebook: tuple[float, ...]
    num_text_targets: int
    num_audio_targets: int
    extra: tuple[float, ...]
    grad_norm: float = math.nan
    applied: bool = False
    per_source: tuple["StepResult", ...] = ()
    keep_base: Divergence | None = None


class NonFiniteError(RuntimeError):
    """A loss or a gradient of this step is NaN or infinite; no update was made from it."""

    def __init__(self, result: StepResult):
        super().__init__(f"loss {result.loss}, gradient norm {result.grad_norm}: not finite")
        self.result = result


def summarise(
    sums: Sequence[float], counts: Sequence[float], weights: LossWeights, *, extra: tuple[float, ...] = ()
) -> StepResult:
    """Losses from the global sums and counts (each: text, then one per codebook)."""
    text_loss, *per_codebook = (total / max(count, 1.0) for total, count in zip(sums, counts, strict=True))
    audio_loss = sum(weight * loss for weight, loss in zip(weights.codebooks, per_codebook, strict=True))
    return StepResult(
        loss=weights.text * text_loss + weights.audio * audio_loss,
        text_loss=text_loss,
        audio_loss=audio_loss,
        audio_loss_per_codebook=tuple(per_codebook),
        num_text_targets=round(counts[0]),
        num_audio_targets=round(sum(counts[1:])),
        extra=extra,
    )


def summarise_sources(
    sums: Sequence[float], counts: Sequence[float], weights: LossWeights, num_sources: int, *, extra: tuple[float, ...]
) -> StepResult:
    """`summarise` over all sources, and over each alone, from the sums and counts of one after the other."""
    width = len(sums) // num_sources
    parts = [slice(start, start + width) for start in range(0, len(sums), width)]
    per_source = tuple(summarise(sums[part], counts[part], weights) for part in parts)
    whole = summarise(_add_up(sums, parts), _add_up(counts, parts), weights, extra=extra)
    return replace(whole, per_source=per_source)


def _add_up(values: Sequence[float], parts: Sequence[slice]) -> list[float]:
    return [sum(column) for column in zip(*(values[part] for part in parts), strict=True)]
