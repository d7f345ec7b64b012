"""Defer the text and audio heads, so that they run only on the rows that a label needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioModel


def _final_hidden_states_only(hidden_states: torch.Tensor, *_args, **_kwargs):
    """Stand in for HiggsAudioDecoderProjector.forward: the hidden states where the text logits would be, no heads."""
    return hidden_states, None, (), (), None, None


@contextmanager
def deferred_heads(model: HiggsAudioModel) -> Iterator[None]:
    """While open, the model's forward returns its final hidden states [batch, seq, hidden] as `logits`.

    No logits exist then: `audio_logits` is None, and the caller applies `model.audio_decoder_proj.text_lm_head` and
    `.audio_lm_head` to the rows it needs.
    """
    assert model.config.audio_decoder_proj_num_layers == 0, "a projector with layers of its own cannot be deferred"
    projector = model.audio_decoder_proj
    own_forward = projector.__dict__.get("forward")  # set where something else has wrapped this module's forward
    projector.forward = _final_hidden_states_only
    try:
        yield
    finally:
        del projector.forward
        if own_forward is not None:
            projector.forward = own_forward
