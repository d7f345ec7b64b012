"""Measures of generated speech against the target recording, from the waveforms alone."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import librosa
import numpy as np
import scipy.fft

SILENCE_DBFS = -50.0
TRIM_DB = 40.0  # below the loudest frame: what counts as silence before and after the speech
FRAME_SECONDS, HOP_SECONDS = 0.025, 0.010
NUM_MELS = 80
NUM_CEPSTRA = 24  # c1 to c24; c0, the loudness, is left out
MEL_FLOOR = 1e-5  # of the loudest band: 100 dB of power
# 10 / ln 10 turns nepers of power into dB; sqrt 2 stands for the two sides of the spectrum (Kubichek 1993).
DB_PER_CEPSTRUM = 10.0 * math.sqrt(2.0) / math.log(10.0)


@dataclass(frozen=True)
class SpeechMeasures:
    """One generated utterance against its target.

    duration_ratio: generated over target seconds.
    silence_share: share of frames under SILENCE_DBFS, 0 to 1.
    mel_cepstral_distance: dB, after aligning the two; None where one of them is silent.
    """

    seconds: float
    duration_ratio: float
    silence_share: float
    mel_cepstral_distance: float | None


def measure_speech(generated: np.ndarray, target: np.ndarray, *, sampling_rate: int) -> SpeechMeasures:
    """Measure mono float32 waveforms of the same rate; `target` has at least one sample."""
    return SpeechMeasures(
        seconds=len(generated) / sampling_rate,
        duration_ratio=len(generated) / len(target),
        silence_share=silence_share(generated, sampling_rate=sampling_rate),
        mel_cepstral_distance=mel_cepstral_distance(generated, target, sampling_rate=sampling_rate),
    )


def silence_share(waveform: np.ndarray, *, sampling_rate: int) -> float:
    """Share of the waveform's frames whose RMS level is under SILENCE_DBFS; 1 for an empty waveform."""
    frame = round(FRAME_SECONDS * sampling_rate)
    if len(waveform) < frame:
        waveform = np.pad(waveform, (0, frame - len(waveform)))
    frames = librosa.util.frame(waveform, frame_length=frame, hop_length=round(HOP_SECONDS * sampling_rate), axis=0)
    levels = np.sqrt(np.mean(np.square(frames, dtype=np.float64), axis=1))
    return float(np.mean(levels < 10 ** (SILENCE_DBFS / 20)))


def mel_cepstral_distance(first: np.ndarray, second: np.ndarray, *, sampling_rate: int) -> float | None:
    """Mean distance in dB along the best alignment (DTW) of two utterances; None where one of them is silent.

    Silence before and after the speech is cut off, and loudness does not count.
    """
    cepstra = [mel_cepstra(waveform, sampling_rate=sampling_rate) for waveform in (first, second)]
    if any(frames is None for frames in cepstra):
        return None
    differences = cepstra[0][:, None, :] - cepstra[1][None, :, :]  # type: ignore[index]
    distances = DB_PER_CEPSTRUM * np.sqrt(np.sum(np.square(differences), axis=-1))
    _, path = librosa.sequence.dtw(C=distances)
    return float(distances[path[:, 0], path[:, 1]].mean())


def mel_cepstra(waveform: np.ndarray, *, sampling_rate: int) -> np.ndarray | None:
    """[frames, NUM_CEPSTRA] float32 of the speech between leading and trailing silence; None where there is none."""
    if silence_share(waveform, sampling_rate=sampling_rate) == 1.0:
        return None
    speech, _ = librosa.effects.trim(waveform, top_db=TRIM_DB)
    power = librosa.feature.melspectrogram(
        y=speech,
        sr=sampling_rate,
        n_fft=2 ** math.ceil(math.log2(FRAME_SECONDS * sampling_rate)),
        win_length=round(FRAME_SECONDS * sampling_rate),
        hop_length=round(HOP_SECONDS * sampling_rate),
        n_mels=NUM_MELS,
    )
    log_amplitude = 0.5 * np.log(np.maximum(power, MEL_FLOOR**2 * power.max()))
    cepstra = scipy.fft.dct(log_amplitude, type=2, axis=0) / (2 * NUM_MELS)
    return cepstra[1 : NUM_CEPSTRA + 1].T.astype(np.float32)


def average(rows: Iterable[Mapping[str, float | bool | None]]) -> dict[str, float]:
    """The mean of every column over the rows that have a value for it; a column without any is left out."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                columns.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in columns.items()}
