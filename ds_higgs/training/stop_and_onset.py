"""Stop and onset, teacher-forced: does the model end where it should, how does it begin, which text costs what."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ds_higgs.batch import IGNORE_INDEX, Batch
from ds_higgs.data.rules import SampleRules
from ds_higgs.losses import Targets
from ds_higgs.training.step_module import TargetScores

ONSET_SECONDS = 2.0
AUDIO_START_TOKEN = "<|audio_out_bos|>"
END_TOKENS = ("<|audio_eos|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
# What is averaged over single targets, in this order; the onset's and the later audio losses follow, by codebook.
AVERAGES = ("eos_probability", "false_eos_rate", "words_loss", "audio_start_loss", "end_tokens_loss")


@dataclass(frozen=True)
class Landmarks:
    """What marks the parts of an utterance.

    onset_frames: code frames of the first ONSET_SECONDS; delay: columns that each codebook comes after the one before.
    audio_start, ends: token ids of text that begins and ends audio or a turn.
    """

    stream_eos: int
    onset_frames: int
    delay: int
    audio_start: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, rules: SampleRules) -> "Landmarks":
        """Of a base checkpoint with its tokenizer and codec."""
        layout = rules.layout
        return cls(
            stream_eos=layout.stream_eos,
            onset_frames=rules.codec.frames_in(ONSET_SECONDS),
            delay=int(layout.delay_pattern),
            audio_start=rules.tokenizer.convert_tokens_to_ids(AUDIO_START_TOKEN),
            ends=_known_ids(rules.tokenizer, END_TOKENS),
        )


def _known_ids(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> tuple[int, ...]:
    known = tokenizer.get_vocab()
    return tuple(known[token] for token in tokens if token in known)


@dataclass(frozen=True)
class StopAndOnset:
    """Averages over a validation; None where there was nothing to average.

    eos_probability: of the stream EOS in codebook 0 where the speech ends; num_ends: over so many ends.
    false_eos_rate: share of the codes before the end where EOS is codebook 0's likeliest.
    onset_audio_loss, later_audio_loss: audio loss of the first ONSET_SECONDS, and of the rest with its end.
    words_loss, audio_start_loss, end_tokens_loss: text loss by kind of token.
    """

    eos_probability: float | None
    false_eos_rate: float | None
    onset_audio_loss: float | None
    later_audio_loss: float | None
    words_loss: float | None
    audio_start_loss: float | None
    end_tokens_loss: float | None
    num_ends: int


ALL_AVERAGES = tuple(field.name for field in fields(StopAndOnset) if field.name != "num_ends")


def known_averages(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the averages in `values` (of an "eval" line) that there are."""
    return {name: values[name] for name in ALL_AVERAGES if values.get(name) is not None}


def describe_ends(values: Mapping[str, Any]) -> str:
    """What an "eval" line tells of ends, in a few words."""
    if values["eos_probability"] is None:
        return "no end token in any speech"
    return f"P(EOS) at the end {values['eos_probability']:.3f}, likeliest before it {values['false_eos_rate'] or 0:.2%}"


def num_totals(num_codebooks: int) -> int:
    """How many sums `measure` makes."""
    return len(AVERAGES) + 2 * num_codebooks


def measure(batch: Batch, targets: Targets, scores: TargetScores, landmarks: Landmarks) -> torch.Tensor:
    """Sums and counts of one micro-batch, [2, num_totals] float64 where `scores` are; `targets` are on the CPU."""
    device = scores.audio.device
    labels = targets.audio_labels
    at_end = labels[0] == landmarks.stream_eos
    before_end = (labels[0] != IGNORE_INDEX) & ~at_end
    start = targets.text_labels == landmarks.audio_start
    ends = torch.isin(targets.text_labels, torch.tensor(landmarks.ends))
    columns = [
        (scores.end, at_end),
        (scores.ends, before_end),
        (scores.text, ~start & ~ends),
        (scores.text, start),
        (scores.text, ends),
    ]
    labelled, onset = labels != IGNORE_INDEX, _is_onset(batch, targets, landmarks)
    for part in (labelled & onset, labelled & ~onset):
        columns += zip(scores.audio.unbind(dim=1), part.unbind(dim=0), strict=True)
    sums = torch.stack([(values.double() * mask.to(device)).sum() for values, mask in columns])
    counts = torch.stack([mask.sum() for _, mask in columns]).double()
    return torch.stack([sums, counts.to(device)])


def _is_onset(batch: Batch, targets: Targets, landmarks: Landmarks) -> torch.Tensor:
    """[codebooks, num_audio_rows] bool: whether the row predicts a code of the first seconds of its segment."""
    codebooks, rows = targets.audio_labels.shape
    if not rows:
        return torch.zeros((codebooks, rows), dtype=torch.bool)
    starts = batch.model_inputs["audio_out_ids_start"]
    segments = torch.searchsorted(starts, targets.audio_frames, right=True) - 1
    columns = targets.audio_frames - starts[segments]  # column 0 is the stream BOS, which predicts the first code
    return columns - landmarks.delay * torch.arange(codebooks).unsqueeze(1) < landmarks.onset_frames


def summarise(sums: list[float], counts: list[float], codebook_weights: tuple[float, ...]) -> StopAndOnset:
    """Averages of what `measure` made, summed over micro-batches and ranks."""
    means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    averages = dict(zip(AVERAGES, means, strict=False))
    audio, num_codebooks = means[len(AVERAGES) :], len(codebook_weights)
    return StopAndOnset(
        **averages,
        onset_audio_loss=_weighted(audio[:num_codebooks], codebook_weights),
        later_audio_loss=_weighted(audio[num_codebooks:], codebook_weights),
        num_ends=round(counts[AVERAGES.index("eos_probability")]),
    )


def _weighted(losses: list[float | None], weights: tuple[float, ...]) -> float | None:
    """As audio_loss is made of its codebooks'; None where a codebook has nothing."""
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return None
    return sum(weight * loss for weight, loss in zip(weights, known, strict=True))
