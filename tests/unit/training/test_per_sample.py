"""Losses sample by sample, whatever stands beside a sample and however many clips of it the model speaks."""

import pytest
import torch

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.losses import build_targets
from ds_higgs.model.loading import load_tokenizer, read_model_config
from ds_higgs.training.per_sample import sums_by_sample
from ds_higgs.training.step_module import TargetScores
from tests.support.batches import Sample, make_batch

SAMPLES = [
    Sample("no clip", (), ()),
    Sample("x y", (2,), (4,), start_index=3, reference_in_assistant=True),  # as served: the reference is spoken, too
    Sample("z", (), (7, 3)),
    Sample("a b c", (5,), (1,)),
]


@pytest.mark.parametrize("chosen", [SAMPLES, SAMPLES[::-1], SAMPLES[1:3]])
def test_a_sample_in_a_batch_counts_what_it_counts_alone(chosen, tiny_base):
    together = ones_of(chosen, tiny_base)
    alone = torch.cat([ones_of([sample], tiny_base) for sample in chosen])
    assert torch.equal(together, alone)
    assert torch.equal(together[:, 0], together[:, 1])  # losses of one each


def ones_of(samples, tiny_base):
    tokenizer, config = load_tokenizer(tiny_base), read_model_config(tiny_base)
    ids = (config.audio_in_token_idx, config.audio_out_token_idx)
    batch = make_batch(samples, tokenizer, config)
    targets = build_targets(batch, placeholder_ids=ids)
    labelled = (targets.audio_labels.t() != IGNORE_INDEX).float()
    rows = torch.zeros(len(labelled))
    scores = TargetScores(torch.ones(len(targets.text_labels)), labelled, end=rows, ends=rows.bool())
    return sums_by_sample(batch, targets, scores, placeholder_ids=ids)
