"""What DeepSpeed wraps: the training step of one micro-batch, label-free inputs to loss sums."""

from functools import cached_property, partial
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn

from ds_higgs.batch import ModelInputs
from ds_higgs.losses import (
    Project,
    Targets,
    audio_loss_sums,
    audio_losses,
    audio_source_rows,
    text_loss_sum,
    text_losses,
    text_source_rows,
)
from ds_higgs.model.adapter_switch import AdapterSwitch
from ds_higgs.model.expanded_forward import forward_label_free
from ds_higgs.model.heads import deferred_heads, text_head
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.lora import unwrap
from ds_higgs.training.keep_base import KeptScales, audio_divergence_sums, text_divergence_sum


class StepOutput(NamedTuple):
    """loss: [] fp32, what this micro-batch adds to the global batch's loss; sums: [1 + codebooks] fp32, detached.

    divergences: the same sums of the divergence from the base, 0 where none is asked for.
    """

    loss: torch.Tensor
    sums: torch.Tensor
    divergences: torch.Tensor


class TargetScores(NamedTuple):
    """How well each target is predicted.

    text: [num_text_targets] fp32 losses, as Targets.text_labels are; audio: [num_audio_rows, codebooks] fp32 losses.
    end: [num_audio_rows] fp32, the probability of the stream EOS in codebook 0; ends: [num_audio_rows] bool, whether
        it is the likeliest code there.
    """

    text: torch.Tensor
    audio: torch.Tensor
    end: torch.Tensor
    ends: torch.Tensor


class _Predicted(NamedTuple):
    """What predicts the targets.

    text_rows: [num_text_targets, width], and the head that makes logits of them.
    audio_logits: [num_audio_rows, codebooks * codebook_size].
    """

    text_rows: torch.Tensor
    head: nn.Module
    audio_logits: torch.Tensor


class StepModule(nn.Module):
    """What DeepSpeed wraps: its forward is the training step, so the engine's own hooks run around it at every stage.

    Calling the model below `engine.module` from outside would skip what `engine.forward` does, which is silently wrong
    with ZeRO-2 and offload, with ZeRO-1 and fp32 accumulation, and with ZeRO-3.

    Args:
        end_weight: `loss.eos_weight`.
    """

    def __init__(self, model: PeftModel | HiggsAudioModel, *, supervised_heads: bool = True, end_weight: float = 1.0):
        super().__init__()
        self.peft_model = model  # with LoRA or without: the names of weights in checkpoints begin with this
        self.supervised_heads = supervised_heads
        self.end_weight = end_weight

    @property
    def higgs(self) -> HiggsAudioModel:
        """The HiggsAudioModel inside, with its LoRA layers, where it has any, in place."""
        return unwrap(self.peft_model)

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn; looked for once, as walking over the modules takes longer than many a kernel."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @cached_property
    def _adapter(self) -> AdapterSwitch:
        assert isinstance(self.peft_model, PeftModel), "only an adapter can be turned off"
        return AdapterSwitch(self.peft_model)

    @property
    def placeholder_ids(self) -> tuple[int, int]:
        """Token ids of <|AUDIO|> and <|AUDIO_OUT|>."""
        return self.higgs.config.audio_in_token_idx, self.higgs.config.audio_out_token_idx

    def forward(
        self,
        model_inputs: ModelInputs,
        targets: Targets,
        scales: torch.Tensor | None,
        kept_scales: KeptScales | None = None,
    ) -> StepOutput | TargetScores:
        """Run the model without labels and return this micro-batch's scaled loss and its loss sums.

        Args:
            scales: [1 + codebooks] fp32, from `losses.loss_scales`; None: nothing is summed up, and each target's
                score is returned, without a gradient.
            kept_scales: of the divergence from the base, which then runs first, while nothing else is held.
        """
        base = None if kept_scales is None else self._predict_base(model_inputs, targets)
        predicted = self._predict(model_inputs, targets)
        if scales is None:
            return self._score(predicted, targets)
        text_scale = scales[0] if self.supervised_heads else None
        text_sum = text_loss_sum(predicted.text_rows, targets.text_labels, predicted.head, scale=text_scale)
        audio_sums = audio_loss_sums(
            predicted.audio_logits, targets.audio_labels, end_code=self._end_code, end_weight=self.end_weight
        )
        sums = torch.cat([text_sum.unsqueeze(0), audio_sums])
        loss, divergences = (scales * sums).sum(), torch.zeros_like(sums)
        if base is not None and kept_scales is not None:
            divergences = self._diverge(predicted, base, targets, kept_scales)
            loss = loss + (kept_scales.values * divergences).sum()
        return StepOutput(loss, sums.detach(), divergences.detach())

    def _predict(self, model_inputs: ModelInputs, targets: Targets) -> _Predicted:
        if not self.supervised_heads:  # the heads run everywhere, as the model comes; for comparison
            outputs = forward_label_free(self.higgs, model_inputs)
            text_rows = text_source_rows(targets, text_token_mask(outputs))
            audio_logits = outputs.audio_logits.flatten(1).index_select(0, targets.audio_frames)
            return _Predicted(outputs.logits.flatten(0, 1).index_select(0, text_rows), nn.Identity(), audio_logits)
        with deferred_heads(self.higgs):
            outputs = forward_label_free(self.higgs, model_inputs)
        hidden = outputs.logits.flatten(0, 1)  # [batch * seq, hidden]
        text_rows = hidden.index_select(0, text_source_rows(targets, text_token_mask(outputs)))
        audio_rows = hidden.index_select(0, audio_source_rows(targets, outputs.audio_out_mask))
        return _Predicted(text_rows, text_head(self.higgs), self.higgs.audio_decoder_proj.audio_lm_head(audio_rows))

    def _predict_base(self, model_inputs: ModelInputs, targets: Targets) -> _Predicted:
        with self._adapter.base():
            return self._predict(model_inputs, targets)

    def _diverge(self, predicted: _Predicted, base: _Predicted, targets: Targets, scales: KeptScales) -> torch.Tensor:
        """[1 + codebooks] fp32 sums of the divergence from the base; 0 where it is not asked for."""
        sums = torch.zeros_like(scales.values)
        text, audio = sums[:1], sums[1:]
        if scales.text:
            scale = scales.values[0] if self.supervised_heads else None
            own_head = base.head if base.head is not predicted.head else None
            project_base = partial(self._project_base, own_head)
            text = text_divergence_sum(
                predicted.text_rows, base.text_rows, predicted.head, project_base, scale=scale
            ).view(1)
        if scales.audio:
            audio = audio_divergence_sums(predicted.audio_logits, base.audio_logits, targets.audio_labels)
        return torch.cat([text, audio])

    def _project_base(self, own_head: nn.Module | None, project: Project, rows: torch.Tensor) -> torch.Tensor:
        """The base's logits: of a head of its own, or of the one that is called, of which `project` is the forward."""
        with self._adapter.off():
            return (project if own_head is None else own_head)(rows)

    @torch.no_grad()
    def _score(self, predicted: _Predicted, targets: Targets) -> TargetScores:
        num_codebooks = targets.audio_labels.shape[0]
        first_codebook = predicted.audio_logits[:, : predicted.audio_logits.shape[-1] // num_codebooks].float()
        return TargetScores(
            text=text_losses(predicted.text_rows, targets.text_labels, predicted.head),
            audio=audio_losses(predicted.audio_logits, targets.audio_labels),
            end=first_codebook.softmax(dim=-1)[:, self._end_code],
            ends=first_codebook.argmax(dim=-1) == self._end_code,
        )

    @property
    def _end_code(self) -> int:
        return self.higgs.config.audio_stream_eos_id


def text_token_mask(outputs) -> torch.Tensor:
    """[batch, expanded_seq] bool: where the expanded sequence holds a text token."""
    return outputs.attention_mask.bool() & ~outputs.audio_in_mask & ~outputs.audio_out_mask
