"""The values of several validation manifests together."""

import math

import pytest

from ds_higgs.training.validation_sets import ValidationSet, combine, curves_of


def values_of(loss):
    losses = {"loss": loss, "text_loss": loss / 4, "audio_loss": loss / 2}
    return {**losses, "audio_loss_per_codebook": [loss] * 8, "num_text_targets": 3, "num_audio_targets": 80}


def test_one_manifest_stays_as_it_is():
    assert combine([values_of(2.0)], [ValidationSet("val", None)]) == values_of(2.0)


def test_several_are_weighed_and_kept_by_name():
    sets = [ValidationSet("new", None, 3.0), ValidationSet("old", None, 1.0), ValidationSet("shown", None, 0.0)]
    found = combine([values_of(2.0), values_of(6.0), values_of(math.nan)], sets)
    assert (found["loss"], found["text_loss"], found["audio_loss"]) == (3.0, 0.75, 1.5)
    assert found["audio_loss_per_codebook"] == [3.0] * 8
    assert found["num_audio_targets"] == 240
    assert found["sources"]["old"] == values_of(6.0)
    assert curves_of(found)["old/audio_loss"] == pytest.approx(3.0)
