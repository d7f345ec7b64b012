"""One optimizer step: label-free forward, globally normalised loss, backward, one reduction, update."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from torch import nn

from ds_higgs.batch import Batch, ModelInputs
from ds_higgs.job import distributed
from ds_higgs.losses import (
    Targets,
    audio_loss_sums,
    audio_source_rows,
    build_targets,
    loss_scales,
    normalised_codebook_weights,
    text_loss_sum,
    text_source_rows,
)
from ds_higgs.model.heads import deferred_heads, text_head
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.lora import unwrap


@dataclass(frozen=True)
class LossWeights:
    """`loss = text x text_loss + audio x sum of codebooks[c] x L_c`; `codebooks` sum to 1."""

    text: float
    audio: float
    codebooks: tuple[float, ...]

    @classmethod
    def build(
        cls, *, text: float, audio: float, codebooks: Sequence[float] | None, num_codebooks: int
    ) -> "LossWeights":
        return cls(text, audio, normalised_codebook_weights(codebooks, num_codebooks))

    def scales(self, counts: torch.Tensor) -> torch.Tensor:
        return loss_scales(counts, text_weight=self.text, audio_weight=self.audio, codebook_weights=self.codebooks)


class StepOutput(NamedTuple):
    """loss: [] fp32, what this micro-batch adds to the global batch's loss; sums: [1 + codebooks] fp32, detached."""

    loss: torch.Tensor
    sums: torch.Tensor


class StepModule(nn.Module):
    """What DeepSpeed wraps: its forward is the training step, so the engine's own hooks run around it at every stage.

    Calling the model below `engine.module` from outside would skip what `engine.forward` does, which is silently wrong
    with ZeRO-2 and offload, with ZeRO-1 and fp32 accumulation, and with ZeRO-3.
    """

    def __init__(self, peft_model: PeftModel, *, supervised_heads: bool = True):
        super().__init__()
        self.peft_model = peft_model
        self.supervised_heads = supervised_heads

    @property
    def higgs(self) -> HiggsAudioModel:
        """The HiggsAudioModel inside, with its LoRA layers in place."""
        return unwrap(self.peft_model)

    @property
    def placeholder_ids(self) -> tuple[int, int]:
        """Token ids of <|AUDIO|> and <|AUDIO_OUT|>."""
        return self.higgs.config.audio_in_token_idx, self.higgs.config.audio_out_token_idx

    def forward(self, model_inputs: ModelInputs, targets: Targets, scales: torch.Tensor) -> StepOutput:
        """Run the model without labels and return this micro-batch's scaled loss and its loss sums.

        Args:
            scales: [1 + codebooks] fp32, from `losses.loss_scales`.
        """
        if self.supervised_heads:
            text_sum, audio_sums = self._supervised_sums(model_inputs, targets, text_scale=scales[0])
        else:
            text_sum, audio_sums = self._full_logits_sums(model_inputs, targets)
        sums = torch.cat([text_sum.unsqueeze(0), audio_sums])
        return StepOutput(loss=(scales * sums).sum(), sums=sums.detach())

    def _supervised_sums(
        self, model_inputs: ModelInputs, targets: Targets, *, text_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads run only on the rows that predict a target."""
        with deferred_heads(self.higgs):
            outputs = self.higgs(**model_inputs, use_cache=False)
        hidden = outputs.logits.flatten(0, 1)  # [batch * seq, hidden]
        text_rows = hidden.index_select(0, text_source_rows(targets, text_token_mask(outputs)))
        audio_rows = hidden.index_select(0, audio_source_rows(targets, outputs.audio_out_mask))
        return (
            text_loss_sum(text_rows, targets.text_labels, text_head(self.higgs), scale=text_scale),
            audio_loss_sums(self.higgs.audio_decoder_proj.audio_lm_head(audio_rows), targets.audio_labels),
        )

    def _full_logits_sums(self, model_inputs: ModelInputs, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads run everywhere, as the model comes; for comparison (`memory.supervised_text_head: false`)."""
        outputs = self.higgs(**model_inputs, use_cache=False)
        text_rows = outputs.logits.flatten(0, 1).index_select(0, text_source_rows(targets, text_token_mask(outputs)))
        audio_rows = outputs.audio_logits.flatten(1).index_select(0, targets.audio_frames)
        return (
            text_loss_sum(text_rows, targets.text_labels, nn.Identity()),
            audio_loss_sums(audio_rows, targets.audio_labels),
        )


def text_token_mask(outputs) -> torch.Tensor:
    """[batch, expanded_seq] bool: where the expanded sequence holds a text token."""
    return outputs.attention_mask.bool() & ~outputs.audio_in_mask & ~outputs.audio_out_mask


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over the global batch: every number is over all ranks and accumulation steps.

    Losses are in nats per target, `audio_loss_per_codebook` one per codebook; `grad_norm` is before clipping.
    applied: False where the update was left out because a loss or a gradient was not finite.
    extra: the caller's values, summed over ranks.
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


class NonFiniteError(RuntimeError):
    """A loss or a gradient of this step is NaN or infinite; no update was made from it."""

    def __init__(self, result: StepResult):
        super().__init__(f"loss {result.loss}, gradient norm {result.grad_norm}: not finite")
        self.result = result


def train_step(
    engine: DeepSpeedEngine,
    batches: Sequence[Batch],
    weights: LossWeights,
    *,
    skip_non_finite: bool = False,
    extra: Sequence[float] = (),
) -> StepResult:
    """Make one optimizer step from this rank's micro-batches of a global batch.

    The gradient is that of the global batch's loss, however the batch is split over ranks and accumulation steps.

    Args:
        engine: from `build_engine`.
        batches: this rank's micro-batches, on the CPU; every rank has equally many.
        skip_non_finite: leave the update out on all ranks, rather than raise.
        extra: this rank's values (sample and token counts, flags) to be summed over ranks in the losses' reduction.

    Raises:
        NonFiniteError: on every rank alike, before any update.
    """
    module: StepModule = engine.module
    targets = [build_targets(batch, placeholder_ids=module.placeholder_ids) for batch in batches]
    counts = global_counts(targets, engine.device)
    # engine.backward divides by the accumulation steps and the reduction by the ranks; here the global batch is one.
    divided_by = engine.gradient_accumulation_steps() * distributed.world_size()
    scales = (weights.scales(counts) * divided_by).float()

    sums = torch.zeros_like(counts)
    with reduce_once(engine) as gradients:
        for batch, batch_targets in zip(batches, targets, strict=True):
            output = engine(batch.model_inputs.to(engine.device), batch_targets.to(engine.device), scales)
            engine.backward(output.loss)
            if len(batches) > 1:
                gradients.collect()
            sums += output.sums
        finite = gradients.finish()
        reduced = torch.cat([sums, (~finite).double().view(1), sums.new_tensor(extra)])
        distributed.all_reduce_sum(reduced)

    # The step's one wait for the device: whether to update has to be known before the update.
    sums_now, (non_finite_ranks, *extra_sums) = _split_at(reduced.tolist(), counts.numel())
    result = summarise(sums_now, counts.tolist(), weights, extra=tuple(extra_sums))
    if non_finite_ranks or not math.isfinite(result.loss):
        if not skip_non_finite:
            raise NonFiniteError(result)
        return _skip_update(engine, result)
    return _update(engine, result, skip_non_finite=skip_non_finite)


def global_counts(targets: Sequence[Targets], device: torch.device) -> torch.Tensor:
    """[1 + codebooks] float64 on `device`: text and audio targets of the global batch."""
    counts = torch.stack([one.counts() for one in targets]).sum(dim=0)
    return distributed.all_reduce_sum(counts.to(device))


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


@contextmanager
def reduce_once(engine: DeepSpeedEngine) -> Iterator["LocalGradients"]:
    """Keep gradients on this rank while open; on leaving, reduce them over the ranks in one pass.

    One reduction per optimizer step is right at every stage, with overlap and offload, and ranks may differ in which
    parameters got a gradient.
    """
    gradients = LocalGradients([parameter for parameter in engine.module.parameters() if parameter.requires_grad])
    with _unreduced(engine):
        try:
            yield gradients
        except BaseException:
            gradients.drop()  # a failing rank must not enter a reduction that the others are not in
            raise
    if engine.zero_optimization_stage() == 0:
        engine.allreduce_gradients()


def _unreduced(engine: DeepSpeedEngine) -> AbstractContextManager[None]:
    return engine.no_sync() if engine.zero_optimization_stage() == 0 else engine.coalesce_grad_reduction()


class LocalGradients:
    """This rank's gradients of one optimizer step, accumulated in fp32 over its micro-batches."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self._sums: dict[nn.Parameter, torch.Tensor] = {}

    def collect(self) -> None:
        """Move low-precision gradients of a micro-batch into the fp32 sums; fp32 ones accumulate where they are."""
        for parameter in self.parameters:
            if parameter.grad is None or parameter.grad.dtype == torch.float32:
                continue
            if parameter in self._sums:
                self._sums[parameter].add_(parameter.grad)
            else:
                self._sums[parameter] = parameter.grad.float()
            parameter.grad = None

    def finish(self) -> torch.Tensor:
        """Put the sums in place, zeros where no micro-batch gave a gradient; return whether all are finite, [] bool."""
        gradients = [self._finish(parameter) for parameter in self.parameters]
        return torch.stack(torch._foreach_norm(gradients)).isfinite().all()

    def _finish(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter in self._sums:
            return _set_gradient(parameter, self._sums.pop(parameter).to(parameter.dtype))
        if parameter.grad is None:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: of a parameter that ZeRO-3 splits
            return _set_gradient(parameter, torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
        return parameter.grad

    def drop(self) -> None:
        self._sums.clear()
        for parameter in self.parameters:
            parameter.grad = None


def _set_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """Set a whole gradient, also where ZeRO-3 has left nothing of the parameter: torch wants the two of one shape."""
    held = parameter.data
    parameter.data = gradient
    parameter.grad = gradient
    parameter.data = held
    return gradient


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
    grads = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(grads).item()


def _split_at(values: list[float], index: int) -> tuple[list[float], list[float]]:
    return values[:index], values[index:]
