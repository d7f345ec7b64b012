"""Defer the text and audio heads, so that they run only on the rows that a label needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ds_higgs.module_calls import replaced_forward


def _final_hidden_states_only(hidden_states: torch.Tensor, *_args, **_kwargs):
    """Stand in for HiggsAudioDecoderProjector.forward: the hidden states where the text logits would be, no heads."""
    return hidden_states, None, (), (), None, None


@contextmanager
def deferred_heads(model: HiggsAudioModel) -> Iterator[None]:
    """While open, the model's forward returns its final hidden states [batch, seq, hidden] as `logits`.

    No logits exist then: `audio_logits` is None, and the caller applies `text_head(model)` and
    `model.audio_decoder_proj.audio_lm_head` to the rows it needs.
    """
    assert model.config.audio_decoder_proj_num_layers == 0, "a projector with layers of its own cannot be deferred"
    with replaced_forward(model.audio_decoder_proj, _final_hidden_states_only):
        yield


def text_head(model: HiggsAudioModel) -> nn.Module:
    """The module that projects to text logits; where PEFT trains a copy of it, that copy, whose weights are its own."""
    head = model.audio_decoder_proj.text_lm_head
    if isinstance(head, ModulesToSaveWrapper) and not head.disable_adapters and head.active_adapters:
        return head.modules_to_save[head.active_adapters[0]]
    return head
