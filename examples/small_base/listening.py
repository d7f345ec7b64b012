"""What is heard in a recording, without any model: what it says, how high the voice is and how it sounds."""

from collections.abc import Sequence

import librosa
import numpy as np

SAMPLE_RATE = 24_000
HOP = 240  # 10 ms
NUM_MFCC = 12  # more of them would hear the pitch
LOUD_DB = 30  # below the loudest frame: what is fainter is not measured
LOWEST_HZ, HIGHEST_HZ = 60, 500
UNVOICED = 0.15  # YIN's aperiodicity above which a frame has no pitch


def words(waveform: np.ndarray) -> np.ndarray:
    """[2 * NUM_MFCC, frames]: mean-normalised MFCC with deltas, which change little from voice to voice."""
    mfcc = librosa.feature.mfcc(y=_padded(waveform), sr=SAMPLE_RATE, n_mfcc=NUM_MFCC + 1, hop_length=HOP, n_fft=1024)[
        1:
    ]
    mfcc = (mfcc - mfcc.mean(axis=1, keepdims=True)) / (mfcc.std(axis=1, keepdims=True) + 1e-6)
    return np.concatenate([mfcc, librosa.feature.delta(mfcc, width=9)])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """How far apart two recordings' `words` are: the cost of the best alignment, per step of it."""
    cost, path = librosa.sequence.dtw(one, other, metric="euclidean")
    return float(cost[-1, -1] / len(path))


def nearest(heard: np.ndarray, candidates: Sequence[np.ndarray]) -> int:
    """The candidate whose words are nearest to those heard."""
    return int(np.argmin([distance(heard, candidate) for candidate in candidates]))


def pitch(waveform: np.ndarray) -> float:
    """Median fundamental frequency of the voiced frames, in octaves above 1 Hz; NaN without any."""
    frames = librosa.util.frame(_padded(waveform), frame_length=1024, hop_length=HOP).T
    loud = frames[_is_loud(np.sqrt((frames**2).mean(axis=1)))]
    hertz = [value for frame in loud if (value := _fundamental(frame)) is not None]
    return float(np.log2(np.median(hertz))) if hertz else float("nan")


def spectrum(waveform: np.ndarray) -> np.ndarray:
    """[40]: mean log-mel spectrum of the loud frames, in dB, its own mean taken off; NaN without any sound."""
    mels = librosa.feature.melspectrogram(y=_padded(waveform), sr=SAMPLE_RATE, n_fft=1024, hop_length=HOP, n_mels=40)
    loud = mels[:, _is_loud(np.sqrt(mels.sum(axis=0)))]
    if loud.shape[1] == 0:
        return np.full(len(mels), np.nan)
    mean = librosa.power_to_db(loud + 1e-8).mean(axis=1)
    return mean - mean.mean()


def _fundamental(frame: np.ndarray) -> float | None:
    """YIN (de Cheveigne and Kawahara, 2002) on one frame, in Hz; None where it is not periodic."""
    spectrum = np.abs(np.fft.rfft(frame, 2 * len(frame))) ** 2
    correlation = np.fft.irfft(spectrum)[: len(frame)]
    energy = np.concatenate([[0.0], np.cumsum(frame**2)])
    lags = np.arange(len(frame))
    difference = energy[len(frame) - lags] + energy[-1] - energy[lags] - 2 * correlation
    mean = np.cumsum(difference[1:]) / lags[1:]
    normalised = difference[1:] / np.maximum(mean, 1e-12)
    first, last = SAMPLE_RATE // HIGHEST_HZ, SAMPLE_RATE // LOWEST_HZ
    window = normalised[first - 1 : last]
    below = np.flatnonzero(window < UNVOICED)
    if len(below) == 0:
        return None
    lag = below[0]
    while lag + 1 < len(window) and window[lag + 1] < window[lag]:
        lag += 1
    return SAMPLE_RATE / (first + lag)


def _is_loud(magnitude: np.ndarray) -> np.ndarray:
    return magnitude > magnitude.max() * 10 ** (-LOUD_DB / 20)


def _padded(waveform: np.ndarray) -> np.ndarray:
    """At least a fifth of a second, which every measure can be taken of."""
    return np.pad(waveform.astype(np.float32), (0, max(0, SAMPLE_RATE // 5 - len(waveform))))
