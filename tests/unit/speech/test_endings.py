"""How speech ends, told from planted codes."""

import pytest
import torch

from ds_higgs.speech.endings import NGRAM, count_endings, judge_ending, repeated_share

TARGET = torch.randint(0, 1024, (8, 100), generator=torch.Generator().manual_seed(0))


def test_the_recording_itself_ends_in_time_and_does_not_repeat():
    found = judge_ending(TARGET, TARGET, stopped_by="eos")
    assert vars(found) == {"ending": "in_time", "repeated_share": 0.0, "repeats": False}


@pytest.mark.parametrize(
    ("codes", "stopped_by", "ending", "repeats"),
    [
        (TARGET[:, :49], "eos", "early", False),
        (TARGET[:, :50], "eos", "in_time", False),
        (TARGET[:, :0], "eos", "early", False),
        (TARGET, "length", "never", False),
        (torch.cat([TARGET, *[TARGET[:, 80:]] * 3], dim=1), "eos", "in_time", True),
        (torch.cat([TARGET[:, :40], TARGET[:, 39:40].expand(-1, 60)], dim=1), "length", "never", True),
    ],
)
def test_planted_endings_are_named(codes, stopped_by, ending, repeats):
    found = judge_ending(codes, TARGET, stopped_by=stopped_by)
    assert (found.ending, found.repeats) == (ending, repeats)


def test_a_pause_that_the_recording_has_too_is_no_repetition():
    paused = torch.cat([TARGET, TARGET[:, -1:].expand(-1, 100)], dim=1)
    assert repeated_share(paused) > 0.4
    assert not judge_ending(paused, paused, stopped_by="eos").repeats


def test_the_share_is_of_runs():
    codes = torch.cat([TARGET[:, :NGRAM], TARGET[:, :NGRAM]], dim=1)
    assert repeated_share(codes) == pytest.approx(1 / (NGRAM + 1))  # the last of nine runs


def test_endings_are_counted():
    rows = [{"ending": "never", "repeats": True}, {"ending": "early", "repeats": False}]
    counts = {"num_spoken": 3, "never_ending": 2, "early_ending": 1, "repeating": 2}
    assert count_endings([*rows, rows[0]]) == counts
