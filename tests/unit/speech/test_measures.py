"""The measures give known answers on made audio."""

import math
from pathlib import Path

import librosa
import numpy as np
import pytest

from ds_higgs.speech.measures import average, measure_speech, mel_cepstral_distance, silence_share

RATE = 24_000
AUDIO = Path(__file__).parents[3] / "examples" / "voice_cloning" / "audio"


def load(name: str) -> np.ndarray:
    return librosa.load(AUDIO / f"{name}.flac", sr=None)[0]


def tone(frequency: float, seconds: float, level: float = 0.3) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (level * np.sin(2 * math.pi * frequency * time)).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), dtype=np.float32)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    result = mel_cepstral_distance(first, second, sampling_rate=RATE)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load("speaker_001_00")


@pytest.mark.parametrize(
    ("waveform", "share"),
    [
        (silence(1), 1.0),
        (tone(200, 1), 0.0),
        (np.concatenate([tone(200, 1), silence(1)]), 0.5),
        (np.concatenate([silence(3), tone(200, 1)]), 0.75),
        (tone(200, 1, level=1e-3), 1.0),
        (np.zeros(0, dtype=np.float32), 1.0),
    ],
)
def test_the_share_of_silence(waveform: np.ndarray, share: float):
    assert silence_share(waveform, sampling_rate=RATE) == pytest.approx(share, abs=0.02)


def test_an_equal_waveform_has_no_distance(speech: np.ndarray):
    assert distance(speech, speech) == 0.0


def test_loudness_and_a_shift_do_not_count(speech: np.ndarray):
    assert distance(0.5 * speech, speech) < 0.05
    shifted = np.concatenate([silence(0.5), speech, silence(0.3)])
    assert distance(shifted, speech) < 0.5


@pytest.mark.costly
def test_a_slower_copy_is_aligned(speech: np.ndarray):
    slower = librosa.effects.time_stretch(speech, rate=0.8)
    assert distance(slower, speech) < 0.5 * distance(load("speaker_004_00"), speech)


def test_another_voice_is_further_away_than_the_same_words_again(speech: np.ndarray):
    noise = np.random.default_rng(0).normal(size=len(speech)).astype(np.float32)
    slightly_noisy = speech + 1e-3 * noise
    assert distance(slightly_noisy, speech) < distance(load("speaker_003_00"), speech) < distance(0.1 * noise, speech)


def test_the_distance_is_symmetric_and_in_db():
    # A filter that multiplies the spectrum's tilt: the distance of its cepstrum, as the textbook has it.
    noise = np.random.default_rng(0).normal(size=5 * RATE).astype(np.float32)
    filtered = np.convolve(noise, [1, -0.9])[: len(noise)].astype(np.float32)
    assert distance(noise, filtered) == pytest.approx(distance(filtered, noise), rel=1e-6)
    frequencies = librosa.mel_frequencies(n_mels=82, fmax=RATE / 2)[1:-1]
    log_gain = np.log(np.abs(1 - 0.9 * np.exp(-2j * np.pi * frequencies / RATE)))
    cosines = np.cos(np.pi * np.arange(1, 25)[:, None] * (np.arange(80) + 0.5) / 80)
    expected = 10 * math.sqrt(2) / math.log(10) * np.linalg.norm(cosines @ log_gain / 80)
    assert distance(noise, filtered) == pytest.approx(expected, rel=0.2)


def test_silence_has_no_distance(speech: np.ndarray):
    assert mel_cepstral_distance(silence(1), speech, sampling_rate=RATE) is None
    assert mel_cepstral_distance(speech, silence(1), sampling_rate=RATE) is None


def test_a_cut_shows_in_the_duration(speech: np.ndarray):
    cut = measure_speech(speech[: len(speech) // 2], speech, sampling_rate=RATE)
    assert cut.duration_ratio == pytest.approx(0.5, abs=1e-4)
    assert cut.seconds == pytest.approx(len(speech) / RATE / 2, abs=1e-3)
    assert cut.mel_cepstral_distance is not None
    assert cut.mel_cepstral_distance > 1


def test_averages_leave_out_what_has_no_value():
    rows = [{"a": 1.0, "b": None, "stopped": True}, {"a": 3.0, "b": None, "stopped": False}]
    assert average(rows) == {"a": 2.0, "stopped": 0.5}
