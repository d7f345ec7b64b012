"""Small micro-batches through boson_multimodal's own sample preparation and collator, with random codes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample

from ds_higgs.batch import MODEL_INPUT_NAMES, Batch, Labels, ModelInputs


@dataclass(frozen=True)
class Sample:
    """What a made-up sample holds: its text, the frames of its reference clips and of its target clips."""

    text: str
    reference_frames: tuple[int, ...] = (6,)
    target_frames: tuple[int, ...] = (9,)
    start_index: int | None = None
    reference_in_assistant: bool = False


def chatml(sample: Sample) -> dict:
    """The sample as ChatML, in the form of the example manifest."""
    audio = {"type": "audio", "audio_url": "x.flac"}
    text = {"type": "text", "text": sample.text}
    role = "assistant" if sample.reference_in_assistant else "user"
    return {
        "messages": [
            {"role": "system", "content": "Speak."},
            {"role": role, "content": [text, *([audio] * len(sample.reference_frames))]},
            {"role": "user", "content": "قل: " + sample.text},
            {"role": "assistant", "content": [text, *([audio] * len(sample.target_frames))]},
        ],
        "start_index": sample.start_index,
    }


def build_collator(config) -> HiggsAudioSampleCollator:
    """boson's collator with the base checkpoint's settings, without the package's own wrapper around it."""
    return HiggsAudioSampleCollator(
        whisper_processor=None,
        audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx,
        pad_token_id=config.pad_token_id,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        encode_whisper_embed=False,
        return_audio_in_tokens=True,
        audio_num_codebooks=config.audio_num_codebooks,
        use_delay_pattern=config.use_delay_pattern,
        mask_audio_out_token_label=False,
    )


def collate(samples: Sequence[Sample], tokenizer, config, *, seed: int = 0):
    """boson's collated batch of `samples`, codes drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return build_collator(config)([_dataset_sample(sample, tokenizer, config, generator) for sample in samples])


def make_batch(samples: Sequence[Sample], tokenizer, config, *, seed: int = 0) -> Batch:
    """`samples` as a Batch."""
    collated = collate(samples, tokenizer, config, seed=seed)
    audio_labels = collated.label_audio_ids
    if audio_labels.numel() == 0:
        audio_labels = torch.zeros(config.audio_num_codebooks, 0, dtype=torch.long)
    return Batch(
        model_inputs=ModelInputs(**{name: getattr(collated, name) for name in MODEL_INPUT_NAMES}),
        labels=Labels(text=collated.label_ids, audio=audio_labels),
        sample_ids=tuple(f"made:{index}" for index in range(len(samples))),
        num_tokens=int(collated.attention_mask.sum()),
    )


def _dataset_sample(sample: Sample, tokenizer, config, generator) -> ChatMLDatasetSample:
    input_ids, label_ids, _, _ = prepare_chatml_sample(chatml(sample), tokenizer)
    frames = [*sample.reference_frames, *sample.target_frames]
    codes = [
        torch.randint(0, config.audio_codebook_size, (config.audio_num_codebooks, length), generator=generator)
        for length in frames
    ]
    starts = torch.tensor([0, *frames[:-1]]).cumsum(0) if frames else torch.zeros(0, dtype=torch.long)
    empty = torch.zeros(config.audio_num_codebooks, 0, dtype=torch.long)
    return ChatMLDatasetSample(
        input_ids=torch.tensor(input_ids),
        label_ids=torch.tensor(label_ids),
        audio_ids_concat=torch.cat(codes, dim=1) if codes else empty,
        audio_ids_start=starts,
        audio_waveforms_concat=torch.zeros(0),
        audio_waveforms_start=torch.zeros(0, dtype=torch.long),
        audio_sample_rate=torch.zeros(0),
        audio_speaker_indices=torch.zeros(0, dtype=torch.long),
    )
