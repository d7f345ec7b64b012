"""One optimizer step: label-free forward, globally normalised loss, backward, one reduction, update."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from deepspeed import DeepSpeedEngine

from ds_higgs.batch import Batch
from ds_higgs.job import distributed
from ds_higgs.losses import LossWeights, Targets, build_targets
from ds_higgs.training.keep_base import KeptBase
from ds_higgs.training.reduction import reduce_once
from ds_higgs.training.results import NonFiniteError, StepResult, summarise_sources
from ds_higgs.training.step_module import StepModule


def train_step(
    engine: DeepSpeedEngine,
    batches: Sequence[Batch],
    weights: LossWeights,
    *,
    keep: KeptBase | None = None,
    num_sources: int = 1,
    skip_non_finite: bool = False,
    extra: Sequence[float] = (),
) -> StepResult:
    """Make one optimizer step from this rank's micro-batches of a global batch.

    The gradient is that of the global batch's loss, however the batch is split over ranks and accumulation steps.

    Args:
        engine: from `build_engine`.
        batches: this rank's micro-batches, on the CPU; every rank has equally many.
        keep: the divergence from the base that is part of the loss.
        num_sources: of the batches; the losses of each are told apart.
        skip_non_finite: leave the update out on all ranks, rather than raise.
        extra: this rank's values (sample and token counts, flags) to be summed over ranks in the losses' reduction.

    Raises:
        NonFiniteError: on every rank alike, before any update.
    """
    module: StepModule = engine.module
    targets = [build_targets(batch, placeholder_ids=module.placeholder_ids) for batch in batches]
    counts = global_counts(batches, targets, engine.device, num_sources=num_sources)
    # engine.backward divides by the accumulation steps and the reduction by the ranks; here the global batch is one.
    divided_by = engine.gradient_accumulation_steps() * distributed.world_size()
    scales = (weights.scales(counts.sum(dim=0)) * divided_by).float()
    kept_scales = None if keep is None else keep.scales(counts, times=divided_by)

    sums, divergences = torch.zeros_like(counts), torch.zeros_like(counts)
    with reduce_once(engine) as gradients:
        for batch, batch_targets in zip(batches, targets, strict=True):
            inputs, on_device = batch.model_inputs.to(engine.device), batch_targets.to(engine.device)
            output = engine(inputs, on_device, scales, kept_scales if keep and keep.covers(batch.source) else None)
            engine.backward(output.loss)
            if len(batches) > 1:
                gradients.collect()
            sums[batch.source] += output.sums
            divergences[batch.source] += output.divergences
        finite = gradients.finish()
        reduced = torch.cat([sums.flatten(), divergences.flatten(), (~finite).double().view(1), sums.new_tensor(extra)])
        distributed.all_reduce_sum(reduced)

    # The step's one wait for the device: whether to update has to be known before the update.
    sums_now, rest = _split_at(reduced.tolist(), counts.numel())
    divergences_now, (non_finite_ranks, *extra_sums) = _split_at(rest, counts.numel())
    result = summarise_sources(sums_now, counts.flatten().tolist(), weights, num_sources, extra=tuple(extra_sums))
    if keep is not None:
        result = keep.add_to(result, torch.tensor(divergences_now).view(counts.shape), counts.cpu())
    if non_finite_ranks or not math.isfinite(result.loss):
        if not skip_non_finite:
            raise NonFiniteError(result)
        return _skip_update(engine, result)
    return _update(engine, result, skip_non_finite=skip_non_finite)


def global_counts(
    batches: Sequence[Batch], targets: Sequence[Targets], device: torch.device, *, num_sources: int
) -> torch.Tensor:
    """[num_sources, 1 + codebooks] float64 on `device`: text and audio targets of the global batch."""
    of_batches = torch.stack([one.counts() for one in targets])
    sources = torch.tensor([batch.source for batch in batches])
    counts = of_batches.new_zeros(num_sources, of_batches.shape[1]).index_add_(0, sources, of_batches)
    return distributed.all_reduce_sum(counts.to(device))


def _update(engine: DeepSpeedEngine, result: StepResult, *, skip_non_finite: bool) -> StepResult:
    grad_norm = _plain_grad_norm(engine) if _is_plain_optimizer(engine) else None
    engine.step()
    if grad_norm is None:
        grad_norm = float(engine.get_global_grad_norm())
    result = replace(result, grad_norm=grad_norm, applied=engine.was_step_applied())
    if not math.isfinite(grad_norm) and not skip_non_finite:
        raise NonFiniteError(result)  # finite on every rank, but not their sum: DeepSpeed left the update out
    return result


def _skip_update(engine: DeepSpeedEngine, result: StepResult) -> StepResult:
    if _is_plain_optimizer(engine):
        engine.optimizer.zero_grad()
    else:
        engine.step()  # DeepSpeed's own overflow check drops these gradients
        assert not engine.was_step_applied(), "DeepSpeed updated from a non-finite gradient"
    return result


def _is_plain_optimizer(engine: DeepSpeedEngine) -> bool:
    """Whether DeepSpeed uses torch's optimizer as it is (stage 0 in fp32), without its own norm and overflow check."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _plain_grad_norm(engine: DeepSpeedEngine) -> float:
    """In double, as DeepSpeed's: on a CPU the fp32 norm of 10^5 numbers is 1e-5 too small, and more of larger ones."""
    grads = [parameter.grad for parameter in engine.module.trained if parameter.grad is not None]
    norms = torch._foreach_norm(grads, 2, dtype=torch.float64)
    return torch.stack(norms).norm().item()


def _split_at(values: list[float], index: int) -> tuple[list[float], list[float]]:
    return values[:index], values[index:]
