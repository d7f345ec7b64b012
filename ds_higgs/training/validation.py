"""Validation loss: token-weighted over all micro-batches and ranks, without labels in the model and without dropout."""

from collections.abc import Callable, Iterable, Sequence

import torch
from deepspeed import DeepSpeedEngine

from ds_higgs.batch import Batch, ModelInputs
from ds_higgs.config import LossConfig
from ds_higgs.job import distributed
from ds_higgs.losses import LossWeights, Targets, build_targets
from ds_higgs.training.results import StepResult, summarise
from ds_higgs.training.step_module import StepOutput


def build_loss_weights(config: LossConfig, *, num_codebooks: int) -> LossWeights:
    """The weights by which losses are summed up, in training and wherever its losses are computed again."""
    return LossWeights.build(
        text=config.text_weight,
        audio=config.audio_weight,
        codebooks=config.codebook_weights,
        num_codebooks=num_codebooks,
    )


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, batches: Iterable[Batch], weights: LossWeights) -> StepResult:
    """The losses over `batches` of all ranks; every rank has equally many.

    Dropout is off meanwhile, and no random number is drawn: a run with validation trains as one without.
    """
    engine.eval()
    totals = sum_losses(
        engine,
        batches,
        num_codebooks=len(weights.codebooks),
        placeholder_ids=engine.module.placeholder_ids,
        device=engine.device,
    )
    engine.train()
    sums, counts = distributed.all_reduce_sum(totals).tolist()
    return summarise(sums, counts, weights)


def sum_losses(
    step: Callable[[ModelInputs, Targets, torch.Tensor], StepOutput],
    batches: Iterable[Batch],
    *,
    num_codebooks: int,
    placeholder_ids: Sequence[int],
    device: torch.device,
) -> torch.Tensor:
    """Loss sums and counts of `batches`, [2, 1 + codebooks] float64 on `device`: text, then one per codebook.

    Args:
        step: a StepModule, or the engine around one.
    """
    totals = torch.zeros(2, 1 + num_codebooks, dtype=torch.float64, device=device)
    unscaled = torch.zeros(1 + num_codebooks, device=device)
    for batch in batches:
        targets = build_targets(batch, placeholder_ids=placeholder_ids)
        output = step(batch.model_inputs.to(device), targets.to(device), unscaled)
        totals[0] += output.sums
        totals[1] += targets.counts().to(device)
    return totals
