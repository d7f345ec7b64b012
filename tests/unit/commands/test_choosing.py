"""Which model is taken: by a better number where samples agree on it, and never by noise."""

import numpy as np
import pytest

from ds_higgs.commands.choosing import (
    MeasuredColumn,
    choose_column,
    describe_choice,
    format_columns,
    measure_losses,
    measure_speech,
)
from ds_higgs.commands.evaluate import Evaluation, summarise_samples
from ds_higgs.errors import UserError
from ds_higgs.losses import LossWeights
from ds_higgs.training.results import summarise

WEIGHTS = LossWeights(text=0.5, audio=2.0, codebooks=(0.75, 0.25))
SAMPLES = 30


def rows(errors: list[int], *, similarity: float | None = None, stopped_by: str = "eos") -> list[dict]:
    """Spoken sentences of 10 words."""
    judged = {} if similarity is None else {"speaker_similarity": similarity}
    return [
        {
            "word_errors": {"edits": count, "length": 10},
            "stopped_by": stopped_by,
            "ending": "in_time",
            "repeats": False,
            **judged,
        }
        for count in errors
    ]


def column(name: str, errors: list[int], **others: float) -> MeasuredColumn:
    return MeasuredColumn(Evaluation(name, {}, []), (measure_speech(rows(errors, **others)),))


def noisy(more: int = 0, *, seed: int = 0) -> list[int]:
    return (np.random.default_rng(seed).integers(0, 6, size=SAMPLES) + more).tolist()


def test_a_small_difference_that_every_sample_shows_is_decided_though_intervals_overlap():
    worse, better = column("step-1", noisy(1)), column("step-2", noisy())
    (low, high), (other_low, _) = (one.intervals()["word_error_rate"] for one in (better, worse))
    assert low < other_low < high
    choice = choose_column([worse, better])
    assert (choice.by, choice.name, choice.undecided) == ("word_error_rate", "step-2", ())
    assert choice.against[0].difference == pytest.approx(0.1)
    assert (choice.against[0].low, choice.against[0].high) == pytest.approx((0.1, 0.1))
    assert "every other one is worse, sample by sample" in "\n".join(describe_choice(choice))


def test_noise_decides_nothing():
    columns = [column(f"step-{seed}", noisy(seed=seed)) for seed in (1, 2)] + [column("step-9", noisy(4))]
    choice = choose_column(columns)
    best = min(columns, key=lambda one: one.values()["word_error_rate"])
    assert choice.name == best.name != "step-9"
    assert {one.name for one in choice.undecided} == {"step-1", "step-2"} - {best.name}
    said = "\n".join(describe_choice(choice))
    assert "not decided" in said
    assert "step-9" not in said


def test_one_sample_decides_nothing():
    choice = choose_column([column("step-1", [0]), column("step-2", [9])])
    assert choice.name == "step-1"
    assert [(one.low, one.decided) for one in choice.against] == [(None, False)]
    assert column("step-1", [0]).intervals() == {}


def test_voices_are_better_where_they_are_more_alike_and_the_user_says_by_what():
    columns = [column("base", noisy(), similarity=0.9), column("step-1", noisy(2), similarity=0.8)]
    choice = choose_column(columns, by="speaker_similarity")
    assert (choice.name, choice.value) == ("base", pytest.approx(0.9))
    assert "no adapter is better than the base" in describe_choice(choice)
    with pytest.raises(UserError, match="--by loss: was not measured; expected one of word_error_rate, stop_rate"):
        choose_column(columns, by="loss")


def test_values_are_those_of_the_evaluation():
    spoken = rows(noisy(), similarity=0.4)
    spoken[0] |= {"stopped_by": "length", "speaker_similarity": None, "mel_cepstral_distance": 3.0}
    values = summarise_samples(spoken)
    for name, value in measure_speech(spoken).values().items():
        assert value == pytest.approx(values[name], rel=1e-12), name

    losses = np.random.default_rng(0).random((SAMPLES, 2, 3)) * 50
    losses[:, 1] = losses[:, 1].round() + 1
    found = summarise(*losses.sum(axis=0).tolist(), WEIGHTS)
    measured = measure_losses(losses, WEIGHTS).values()
    assert measured == pytest.approx({name: getattr(found, name) for name in measured}, rel=1e-12)


def test_the_table_has_a_line_for_each(capsys: pytest.CaptureFixture):
    format_columns([column("step-1", noisy()), column("step-2", [0])])
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["word", "error", "rate", "stop", "rate"]
    assert first.startswith("step-1  0.")
    assert " to " in first
    assert second.split() == ["step-2", "0", "1"]
