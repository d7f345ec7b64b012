"""The values of several validation manifests together."""

import math

import pytest

from ds_higgs.training.stop_and_onset import ALL_AVERAGES
from ds_higgs.training.validation_sets import ValidationSet, combine, curves_of


def values_of(loss, *, eos_probability=None):
    losses = {"loss": loss, "text_loss": loss / 4, "audio_loss": loss / 2}
    ends = dict.fromkeys(ALL_AVERAGES) | {"eos_probability": eos_probability, "num_ends": 2}
    return {**losses, **ends, "audio_loss_per_codebook": [loss] * 8, "num_text_targets": 3, "num_audio_targets": 80}


def test_one_manifest_stays_as_it_is():
    assert combine([values_of(2.0)], [ValidationSet("val", None)]) == values_of(2.0)


def test_several_are_weighed_and_kept_by_name():
    sets = [ValidationSet("new", None, 3.0), ValidationSet("old", None, 1.0), ValidationSet("shown", None, 0.0)]
    found = combine([values_of(2.0), values_of(6.0), values_of(math.nan)], sets)
    assert (found["loss"], found["text_loss"], found["audio_loss"]) == (3.0, 0.75, 1.5)
    assert found["audio_loss_per_codebook"] == [3.0] * 8
    assert found["num_audio_targets"] == 240
    assert (found["num_ends"], found["eos_probability"]) == (6, None)
    assert found["sources"]["old"] == values_of(6.0)
    assert curves_of(found)["old/audio_loss"] == pytest.approx(3.0)


def test_averages_that_a_manifest_lacks_are_those_of_the_others():
    sets = [ValidationSet("a", None, 3.0), ValidationSet("b", None, 1.0), ValidationSet("text", None, 1.0)]
    values = [values_of(1.0, eos_probability=0.2), values_of(1.0, eos_probability=0.6), values_of(1.0)]
    assert combine(values, sets)["eos_probability"] == pytest.approx(0.3)
