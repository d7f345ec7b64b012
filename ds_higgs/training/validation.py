"""Validation loss: token-weighted over all micro-batches and ranks, without labels in the model and without dropout."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from ds_higgs.batch import Batch, ModelInputs
from ds_higgs.config import LossConfig
from ds_higgs.job import distributed
from ds_higgs.losses import LossWeights, Targets, build_targets
from ds_higgs.training.metrics import eval_values
from ds_higgs.training.results import StepResult, summarise
from ds_higgs.training.step_module import TargetScores
from ds_higgs.training.stop_and_onset import Landmarks, StopAndOnset, measure, num_totals
from ds_higgs.training.stop_and_onset import summarise as summarise_ends


def build_loss_weights(config: LossConfig, *, num_codebooks: int) -> LossWeights:
    """The weights by which losses are summed up, in training and wherever its losses are computed again."""
    return LossWeights.build(
        text=config.text_weight,
        audio=config.audio_weight,
        codebooks=config.codebook_weights,
        num_codebooks=num_codebooks,
    )


@dataclass(frozen=True)
class Validation:
    """losses: with every code counted once, whatever `loss.eos_weight` says; ends: what they are made of."""

    losses: StepResult
    ends: StopAndOnset

    def values(self) -> dict[str, Any]:
        """The values of an "eval" line."""
        return eval_values(self.losses) | vars(self.ends)


@torch.no_grad()
def evaluate(
    engine: DeepSpeedEngine, batches: Iterable[Batch], weights: LossWeights, landmarks: Landmarks
) -> Validation:
    """The losses over `batches` of all ranks; every rank has equally many.

    Dropout is off meanwhile, and no random number is drawn: a run with validation trains as one without.
    """
    engine.eval()
    totals = sum_scores(
        engine,
        batches,
        num_codebooks=len(weights.codebooks),
        placeholder_ids=engine.module.placeholder_ids,
        device=engine.device,
        landmarks=landmarks,
    )
    engine.train()
    return summarise_scores(distributed.all_reduce_sum(totals), weights)


def sum_scores(
    step: Callable[[ModelInputs, Targets, None], TargetScores],
    batches: Iterable[Batch],
    *,
    num_codebooks: int,
    placeholder_ids: Sequence[int],
    device: torch.device,
    landmarks: Landmarks,
    each: Callable[[Batch, Targets, TargetScores], None] = lambda batch, targets, scores: None,
) -> torch.Tensor:
    """Sums and counts of `batches`, [2, n] float64 on `device`: text, then one per codebook, then `measure`'s.

    Args:
        step: a StepModule, or the engine around one.
        each: told every micro-batch, with its targets on the CPU.
    """
    totals = torch.zeros(2, 1 + num_codebooks + num_totals(num_codebooks), dtype=torch.float64, device=device)
    for batch in batches:
        targets = build_targets(batch, placeholder_ids=placeholder_ids)
        scores = step(batch.model_inputs.to(device), targets.to(device), None)
        each(batch, targets, scores)
        losses = torch.cat([scores.text.sum().unsqueeze(0), scores.audio.sum(dim=0)]).double()
        of_losses = torch.stack([losses, targets.counts().to(device)])
        totals += torch.cat([of_losses, measure(batch, targets, scores, landmarks)], dim=1)
    return totals


def summarise_scores(totals: torch.Tensor, weights: LossWeights) -> Validation:
    """What `sum_scores` made, of all ranks together."""
    split = 1 + len(weights.codebooks)
    sums, counts = totals.tolist()
    return Validation(
        losses=summarise(sums[:split], counts[:split], weights),
        ends=summarise_ends(sums[split:], counts[split:], weights.codebooks),
    )
