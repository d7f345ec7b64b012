"""Measures of a clip as its file has it: level, noise, clipping, silence at the ends, and its outline for a page."""

import hashlib
from dataclasses import dataclass

import numpy as np

FRAME_SECONDS = 0.02
SILENCE_DBFS = -100.0
SPEECH_DB = 25.0  # below the loudest frames: what still counts as speech
EDGE_DB = 35.0  # the same for where speech begins and ends: soft consonants are that far below
OUTLINE_POINTS = 160


@dataclass(frozen=True)
class Sound:
    """One clip.

    rate: of the file, Hz; digest: of its samples, the same for a copy in another lossless format.
    clipped_share: of the samples, in runs at the highest value.
    level_dbfs: of speech; noise_dbfs: of the quietest twentieth of the frames.
    lead_seconds, tail_seconds: before and after speech; end_dbfs: of the last frame.
    outline: OUTLINE_POINTS peaks, 0 to 100 of the clip's highest.
    """

    seconds: float
    rate: int
    digest: str
    clipped_share: float
    level_dbfs: float
    noise_dbfs: float
    lead_seconds: float
    tail_seconds: float
    end_dbfs: float
    outline: tuple[int, ...]

    @property
    def speech_seconds(self) -> float:
        """Between the two silences."""
        return max(self.seconds - self.lead_seconds - self.tail_seconds, FRAME_SECONDS)


def measure_sound(samples: np.ndarray, rate: int) -> Sound:
    """Measure [frames, channels] float32, at least one frame."""
    mono = samples.mean(axis=1)
    levels = _frame_levels(mono, rate)
    loudest = float(np.percentile(levels, 95))
    speech = levels[levels >= loudest - SPEECH_DB]
    heard = np.flatnonzero(levels >= loudest - EDGE_DB)
    return Sound(
        seconds=len(mono) / rate,
        rate=rate,
        digest=hashlib.sha256(np.round(samples * 32767).astype("<i2").tobytes()).hexdigest()[:24],
        clipped_share=max(_clipped_share(channel) for channel in samples.T),
        level_dbfs=float(10 * np.log10(np.mean(10 ** (speech / 10)))),
        noise_dbfs=float(np.percentile(levels, 5)),
        lead_seconds=float(heard[0] * FRAME_SECONDS),
        tail_seconds=float((len(levels) - 1 - heard[-1]) * FRAME_SECONDS),
        end_dbfs=float(_frame_levels(mono[-round(FRAME_SECONDS * rate) :], rate)[-1]),
        outline=_outline(mono),
    )


def _frame_levels(mono: np.ndarray, rate: int) -> np.ndarray:
    """RMS of each whole frame, dBFS; of all samples, where they make no whole frame."""
    size = min(len(mono), max(1, round(FRAME_SECONDS * rate)))
    frames = mono[: len(mono) // size * size].reshape(-1, size).astype(np.float64)
    return 10 * np.log10(np.maximum(np.mean(np.square(frames), axis=1), 10 ** (SILENCE_DBFS / 10)))


def _clipped_share(channel: np.ndarray) -> float:
    """Share of the samples in runs of three or more at the highest value, of either sign."""
    at_peak = np.abs(channel) >= 0.9999 * np.abs(channel).max()
    runs = at_peak[:-2] & at_peak[1:-1] & at_peak[2:]
    return float(np.mean(runs)) if len(runs) and np.abs(channel).max() > 0 else 0.0


def _outline(mono: np.ndarray) -> tuple[int, ...]:
    edges = np.linspace(0, len(mono), OUTLINE_POINTS + 1).astype(int)[:-1]
    peaks = np.maximum.reduceat(np.abs(mono), np.minimum(edges, len(mono) - 1))
    return tuple(np.round(100 * peaks / max(float(peaks.max()), 1e-9)).astype(int).tolist())
