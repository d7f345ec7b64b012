"""HiggsAudioModel's forward on a sequence that is expanded already: it merges without waiting for the device."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel, modeling_higgs_audio

from ds_higgs.batch import ModelInputs
from ds_higgs.layout import ROUND_TO, ExpandedSequence

_ATTRIBUTE = "_expanded_sequence"


def forward_label_free(model: HiggsAudioModel, model_inputs: ModelInputs):
    """`model(**model_inputs)` for training; what it merges is handed to it ready, where the collator made it."""
    with _merging_ready(model, model_inputs.expanded):
        return model(**model_inputs, use_cache=False)


def expanded_sequence(model: HiggsAudioModel) -> ExpandedSequence | None:
    """The sequence that the forward under way was given; None where the model expands it itself."""
    return model.__dict__.get(_ATTRIBUTE)


@contextmanager
def _merging_ready(model: HiggsAudioModel, expanded: ExpandedSequence | None) -> Iterator[None]:
    """While open, the model's forward takes `expanded` instead of merging; None changes nothing."""
    if expanded is None:
        yield
        return
    stock = modeling_higgs_audio.merge_input_ids_with_audio_features
    modeling_higgs_audio.merge_input_ids_with_audio_features = functools.partial(_merge, expanded)
    model.__dict__[_ATTRIBUTE] = expanded
    try:
        yield
    finally:
        modeling_higgs_audio.merge_input_ids_with_audio_features = stock
        del model.__dict__[_ATTRIBUTE]


def _merge(
    expanded: ExpandedSequence,
    audio_features,
    _audio_features_length,
    audio_in: torch.Tensor | None,
    _audio_in_starts,
    audio_out: torch.Tensor,
    _audio_out_starts,
    _audio_in_token,
    _audio_out_token,
    text: torch.Tensor,
    _input_ids,
    _attention_mask,
    labels,
    *,
    round_to: int,
    **_settings,
) -> tuple:
    """Stands in for merge_input_ids_with_audio_features: the same values, placed by indices that are known.

    Args:
        audio_in, audio_out: [frames, hidden] embeddings.
        text: [batch, seq, hidden] embeddings of every token.
    """
    assert audio_features is None, "Whisper features are expanded by the model itself"
    assert labels is None
    assert round_to == ROUND_TO
    sources = [text.flatten(0, 1).index_select(0, expanded.text_tokens), audio_in, audio_out]
    rows = torch.cat([source for source in sources if source is not None])
    shape = expanded.input_ids.shape
    merged = rows.new_zeros(shape.numel(), rows.shape[1]).index_copy(0, expanded.cells, rows)
    return (
        merged.unflatten(0, shape),
        expanded.attention_mask,
        None,
        expanded.position_ids,
        expanded.input_ids,
        expanded.audio_in_mask,
        expanded.audio_in_mask,
        expanded.audio_out_mask,
    )
