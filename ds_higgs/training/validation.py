"""Validation loss: token-weighted over all micro-batches and ranks, without labels in the model and without dropout."""

from collections.abc import Iterable

import torch
from deepspeed import DeepSpeedEngine

from ds_higgs.batch import Batch
from ds_higgs.config import LossConfig
from ds_higgs.job import distributed
from ds_higgs.losses import build_targets
from ds_higgs.training.train_step import LossWeights, StepModule, StepResult, summarise


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
    module: StepModule = engine.module
    totals = torch.zeros(2, 1 + len(weights.codebooks), dtype=torch.float64, device=engine.device)
    unscaled = torch.zeros(1 + len(weights.codebooks), device=engine.device)
    engine.eval()
    for batch in batches:
        targets = build_targets(batch, placeholder_ids=module.placeholder_ids)
        output = engine(batch.model_inputs.to(engine.device), targets.to(engine.device), unscaled)
        totals[0] += output.sums
        totals[1] += targets.counts().to(engine.device)
    engine.train()
    sums, counts = distributed.all_reduce_sum(totals).tolist()
    return summarise(sums, counts, weights)
