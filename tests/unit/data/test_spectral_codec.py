"""The codec of log-mel frames: speech comes back as the same speech, always the same, and misfits are refused."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from ds_higgs.data.codec.opening import load_codec
from ds_higgs.data.codec.spectral import SpectralFrames
from ds_higgs.errors import UserError
from tests.support.launching import ROOT

from .audio_files import RATE, tone

CODEC = ROOT / "examples" / "small_base" / "base" / "codec"
FRAMES = SpectralFrames(
    sampling_rate=RATE, n_fft=1024, hop_length=240, num_mels=128, spectra=4, floor=3e-3, griffin_lim_iterations=60
)


@pytest.fixture(scope="module")
def codec():
    return load_codec(CODEC)


def loudest_hertz(waveform: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(np.fft.rfftfreq(len(waveform), 1 / RATE)[spectrum.argmax()])


def test_frames_come_back_as_sound_of_the_same_pitch_and_loudness():
    time = np.arange(24_000) / RATE
    original = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    returned = FRAMES.synthesise(FRAMES.analyse(torch.from_numpy(original)[None])[0]).numpy()
    middle = slice(4_800, -4_800)
    assert returned.shape == original.shape
    assert loudest_hertz(returned[middle]) == pytest.approx(440, abs=12)  # half a mel band
    assert np.std(returned[middle]) == pytest.approx(np.std(original[middle]), rel=0.25)


def test_silence_is_silent(codec):
    returned = codec.decode(codec.encode([np.zeros(9_600, np.float32)])[0])
    assert np.abs(returned).max() < 0.01


def test_equal_codes_are_equal_audio(codec):
    codes = codec.encode([tone(0.5)])[0]
    assert np.array_equal(codec.decode(codes), codec.decode(codes))
    assert codec.decode(codes[:, :0]).shape == (0,)


def test_each_codebook_brings_the_frames_nearer(codec):
    """Residual quantisation: with one codebook more, the error is smaller."""
    [codes] = codec.encode([tone(1.0)])
    wanted = codec.frames.analyse(torch.from_numpy(tone(1.0))[None])[0]
    rebuilt = codec._mean.expand_as(wanted)
    errors = [(wanted - rebuilt).square().mean()]
    for codebook, row in zip(codec._codebooks, codes, strict=True):
        rebuilt = rebuilt + codebook[row] @ codec._components
        errors.append((wanted - rebuilt).square().mean())
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors


def test_weights_of_another_shape_are_refused(tmp_path):
    shutil.copytree(CODEC, tmp_path / "codec")
    config = json.loads((CODEC / "config.json").read_text())
    (tmp_path / "codec" / "config.json").write_text(json.dumps(config | {"codebook_size": 512}))
    with pytest.raises(UserError, match=r"codebooks of shape \(8, 256, 64\), expected \(8, 512, 64\)"):
        load_codec(tmp_path / "codec")
