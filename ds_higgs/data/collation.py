"""Boson's collator with the base checkpoint's settings, its result split into model inputs and labels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioBatchInput, HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample

from ds_higgs.batch import IGNORE_INDEX, Batch, Labels, ModelInputs
from ds_higgs.data.whisper import build_whisper_processor
from ds_higgs.layout import AudioLayout, ExpandedSequence, expand, whisper_positions


class BatchCollator:
    """Collates samples into a Batch; draws no random numbers."""

    def __init__(self, layout: AudioLayout):
        self.layout = layout
        self._collate = HiggsAudioSampleCollator(
            whisper_processor=(
                build_whisper_processor(layout.mel_bins, layout.whisper_folder) if layout.whisper else None
            ),
            audio_in_token_id=layout.audio_in_token,
            audio_out_token_id=layout.audio_out_token,
            pad_token_id=layout.pad_token,
            audio_stream_bos_id=layout.stream_bos,
            audio_stream_eos_id=layout.stream_eos,
            encode_whisper_embed=layout.whisper,
            return_audio_in_tokens=layout.audio_in_tokens,
            audio_num_codebooks=layout.num_codebooks,
            use_delay_pattern=layout.delay_pattern,
            # With True the collator writes -100 into the sample's own labels, and a sample collated a second time
            # then counts as "do not train".
            mask_audio_out_token_label=False,
        )

    def __call__(self, samples: Sequence[ChatMLDatasetSample], sample_ids: Sequence[str]) -> Batch:
        """Collate CPU samples; they are left as they are."""
        collated = self._collate([replace(sample, label_ids=sample.label_ids.clone()) for sample in samples])
        return Batch(
            model_inputs=self._model_inputs(collated),
            labels=Labels(text=collated.label_ids, audio=self._codes(collated.label_audio_ids)),
            sample_ids=tuple(sample_ids),
            num_tokens=self._count_tokens(collated),
        )

    def _model_inputs(self, collated: HiggsAudioBatchInput) -> ModelInputs:
        has_audio_in = self.layout.audio_in_tokens
        return ModelInputs(
            expanded=self._expand(collated),
            input_ids=collated.input_ids,
            attention_mask=collated.attention_mask,
            audio_features=collated.audio_features,
            audio_feature_attention_mask=collated.audio_feature_attention_mask,
            audio_in_ids=self._codes(collated.audio_in_ids) if has_audio_in else None,
            audio_in_ids_start=collated.audio_in_ids_start if has_audio_in else None,
            audio_out_ids=self._codes(collated.audio_out_ids),
            audio_out_ids_start=collated.audio_out_ids_start,
            audio_out_ids_start_group_loc=collated.audio_out_ids_start_group_loc,
        )

    def _expand(self, collated: HiggsAudioBatchInput) -> ExpandedSequence | None:
        """None where the lengths depend on the model: with Whisper features, or with reference audio left out."""
        layout = self.layout
        if layout.whisper or (not layout.audio_in_tokens and (collated.input_ids == layout.audio_in_token).any()):
            return None
        return expand(
            collated.input_ids,
            collated.attention_mask,
            audio_in_lengths=_segment_lengths(collated.audio_in_ids_start, collated.audio_in_ids),
            audio_out_lengths=_segment_lengths(collated.audio_out_ids_start, collated.audio_out_ids),
            placeholder_ids=(layout.audio_in_token, layout.audio_out_token),
            pad_id=layout.pad_token,
        )

    def _codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Without any audio the stock collator gives shape (0, 0)."""
        return codes if codes.numel() else codes.new_zeros((self.layout.num_codebooks, 0))

    def _count_tokens(self, collated: HiggsAudioBatchInput) -> int:
        """Positions of the expanded sequence that hold a token: each placeholder gives way to what it stands for."""
        num_audio_in = int((collated.input_ids == self.layout.audio_in_token).sum())
        num_audio_out = int((collated.input_ids == self.layout.audio_out_token).sum())
        tokens = int(collated.attention_mask.sum()) - num_audio_out + collated.audio_out_ids.shape[1]
        if self.layout.audio_in_tokens or self.layout.whisper:
            tokens -= num_audio_in
        if self.layout.audio_in_tokens:
            tokens += collated.audio_in_ids.shape[1]
        if self.layout.whisper:
            tokens += int(whisper_positions(collated.audio_feature_attention_mask.sum(-1)).sum())
        return tokens


def _segment_lengths(starts: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Frames of every segment of [codebooks, frames] codes."""
    return torch.diff(starts, append=starts.new_tensor([codes.shape[-1]])) if starts.numel() else starts


def mask_all_labels(batch: Batch) -> Batch:
    """The same inputs with nothing to learn and no samples counted: a filler for a rank that has no micro-batch."""
    labels = Labels(
        text=torch.full_like(batch.labels.text, IGNORE_INDEX), audio=torch.full_like(batch.labels.audio, IGNORE_INDEX)
    )
    return Batch(batch.model_inputs, labels, sample_ids=(), num_tokens=0)
