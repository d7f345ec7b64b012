"""The losses of a micro-batch, sample by sample: what intervals over samples are made of."""

from collections.abc import Sequence

import torch

from ds_higgs.batch import IGNORE_INDEX, Batch
from ds_higgs.losses import Targets, is_text_token
from ds_higgs.training.step_module import TargetScores


def sums_by_sample(
    batch: Batch, targets: Targets, scores: TargetScores, *, placeholder_ids: Sequence[int]
) -> torch.Tensor:
    """Loss sums and counts of each sample, in the order of `batch.sample_ids`: text first, then one per codebook.

    Args:
        batch, targets: on the CPU.
        placeholder_ids: token ids of <|AUDIO|> and <|AUDIO_OUT|>.

    Returns:
        [samples, 2, 1 + codebooks] float64, on the CPU.
    """
    rows = is_text_token(batch, placeholder_ids=placeholder_ids).nonzero()[:, 0][targets.text_supervised]
    counted = targets.audio_labels.t() != IGNORE_INDEX
    parts = [
        (rows, scores.text.unsqueeze(1), torch.ones((len(rows), 1))),
        (_samples_of_frames(batch, targets, placeholder_ids[1]), scores.audio, counted),
    ]
    found = []
    for owners, losses, counts in parts:
        both = torch.stack([losses.double().cpu(), counts.double()], dim=1)  # [targets, 2, columns]
        empty = torch.zeros((len(batch.sample_ids), *both.shape[1:]), dtype=torch.float64)
        found.append(empty.index_add_(0, owners, both))
    return torch.cat(found, dim=2)


def _samples_of_frames(batch: Batch, targets: Targets, audio_out_token: int) -> torch.Tensor:
    """[num_audio_rows] int64: the sample that each row with an audio target is of.

    Clips are numbered as their placeholders stand. (The collator's `audio_out_ids_start_group_loc` has one entry a
    sample, not one a clip.)
    """
    inputs = batch.model_inputs
    owners = (inputs["input_ids"] == audio_out_token).nonzero()[:, 0]
    segments = torch.searchsorted(inputs["audio_out_ids_start"], targets.audio_frames, right=True) - 1
    return owners[segments]
