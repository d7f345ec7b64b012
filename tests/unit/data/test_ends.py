"""What a training tells of its data's ends before it begins."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ds_higgs.batch import IGNORE_INDEX, Labels
from ds_higgs.data.build import Preparation
from ds_higgs.data.codec.dac import DacCodec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.encoding import _check_whole
from ds_higgs.data.review.ends import warn_of_cut_recordings, warn_of_missing_ends
from ds_higgs.errors import UserError
from tests.support.planted_faults import cut_in_speech, with_audio


@pytest.fixture
def warnings_of(make_rules, tmp_path, caplog):
    """What is told of a manifest of the example, of which the first `num_cut` recordings are cut in speech."""

    def tell(example_dir, num_cut: int) -> str:
        folder = tmp_path / str(num_cut)
        shutil.copytree(example_dir / "audio", folder / "audio")
        samples = json.loads((example_dir / "train.json").read_text())
        for sample in samples[:num_cut]:
            with_audio(cut_in_speech)(folder, sample)
        (folder / "train.json").write_text(json.dumps(samples))
        preparation = Preparation(folder / "train.json", rules=make_rules(), cache_dir=tmp_path / "codes")
        preparation.analyse()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_cut_recordings(preparation, make_rules().layout)
        return caplog.text

    return tell


def test_recordings_that_are_cut_in_speech_are_told(warnings_of, example_dir):
    assert "5 of 24 recordings looked at are cut off in speech (sample 0 first)" in warnings_of(example_dir, 5)
    assert warnings_of(example_dir, 1) == ""


class WithoutEnds(BatchCollator):
    """As a fork of boson's collator might be."""

    def __call__(self, samples, sample_ids):
        batch = super().__call__(samples, sample_ids)
        audio = batch.labels.audio
        ends = audio == self.layout.stream_eos
        return replace(batch, labels=Labels(batch.labels.text, audio.masked_fill(ends, IGNORE_INDEX)))


def test_speech_without_an_end_token_is_told(mixed_dataset, make_rules, caplog):
    layout = make_rules().layout
    warn_of_missing_ends(mixed_dataset, BatchCollator(layout))
    assert caplog.text == ""
    warn_of_missing_ends(mixed_dataset, WithoutEnds(layout))
    assert "no end token in its speech" in caplog.text


def test_a_codec_that_leaves_the_end_out_is_refused(codec_source):
    waveform = np.zeros(2 * codec_source.hop_length + 1, dtype=np.float32)
    codec = codec_source.load()
    assert isinstance(codec, DacCodec)
    [codes] = codec.encode([waveform])
    _check_whole(codes, waveform, codec.hop_length)
    with pytest.raises(UserError, match="cuts clips at their end: 2 code frames for 1921 samples, expected 3"):
        _check_whole(torch.clone(codes[:, :-1]), waveform, codec.hop_length)
