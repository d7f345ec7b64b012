"""What DeepSpeed wraps: the training step of one micro-batch, label-free inputs to loss sums."""

from functools import cached_property
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn

from ds_higgs.batch import ModelInputs
from ds_higgs.losses import Targets, audio_loss_sums, audio_source_rows, text_loss_sum, text_source_rows
from ds_higgs.model.expanded_forward import forward_label_free
from ds_higgs.model.heads import deferred_heads, text_head
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.lora import unwrap


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

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn; looked for once, as walking over the modules takes longer than many a kernel."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

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
            outputs = forward_label_free(self.higgs, model_inputs)
        hidden = outputs.logits.flatten(0, 1)  # [batch * seq, hidden]
        text_rows = hidden.index_select(0, text_source_rows(targets, text_token_mask(outputs)))
        audio_rows = hidden.index_select(0, audio_source_rows(targets, outputs.audio_out_mask))
        return (
            text_loss_sum(text_rows, targets.text_labels, text_head(self.higgs), scale=text_scale),
            audio_loss_sums(self.higgs.audio_decoder_proj.audio_lm_head(audio_rows), targets.audio_labels),
        )

    def _full_logits_sums(self, model_inputs: ModelInputs, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads run everywhere, as the model comes; for comparison (`memory.supervised_text_head: false`)."""
        outputs = forward_label_free(self.higgs, model_inputs)
        text_rows = outputs.logits.flatten(0, 1).index_select(0, text_source_rows(targets, text_token_mask(outputs)))
        audio_rows = outputs.audio_logits.flatten(1).index_select(0, targets.audio_frames)
        return (
            text_loss_sum(text_rows, targets.text_labels, nn.Identity()),
            audio_loss_sums(audio_rows, targets.audio_labels),
        )


def text_token_mask(outputs) -> torch.Tensor:
    """[batch, expanded_seq] bool: where the expanded sequence holds a text token."""
    return outputs.attention_mask.bool() & ~outputs.audio_in_mask & ~outputs.audio_out_mask
