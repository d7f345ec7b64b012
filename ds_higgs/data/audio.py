"""Decode one audio clip, whole or a segment, to mono float32 at the codec's rate; refuse what is not usable speech."""

import base64
import binascii
import io
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from ds_higgs.data.containers.opening import file_on_disk, open_audio, split_name
from ds_higgs.data.problems import BadSampleError
from ds_higgs.files import hash_file, hash_stream

SILENCE_PEAK = 1e-4  # -80 dBFS
UNKNOWN_WAV_SIZES = (0, 0xFFFFFFFF)  # what ffmpeg and sox write when they stream
MAX_CHANNELS = 2

# A file, or a recording inside one (`containers.opening`), or what would be in a file.
AudioSource = Path | bytes


@dataclass(frozen=True)
class AudioLimits:
    """Accepted length of a clip, in seconds."""

    min_seconds: float = 0.1
    max_seconds: float = 120.0

    def check(self, seconds: float) -> None:
        """Raises BadSampleError where a clip of this length is too short or too long."""
        if seconds < self.min_seconds:
            raise BadSampleError(f"too short: {seconds:.3f} s of audio", f"at least {self.min_seconds:g} s")
        if seconds > self.max_seconds:
            raise BadSampleError(f"too long: {seconds:.3f} s of audio", f"at most {self.max_seconds:g} s")


@dataclass(frozen=True)
class Segment:
    """The part of an audio file that is meant, in seconds; `duration` None is up to the end."""

    offset: float = 0.0
    duration: float | None = None


def decode_base64(raw_audio: str) -> bytes:
    """Raises BadSampleError where `raw_audio` is not base64."""
    try:
        return base64.b64decode("".join(raw_audio.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSampleError(f"`raw_audio` is not base64: {error}") from None


def check_file(path: Path) -> os.stat_result:
    """Raises BadSampleError where the file (or the one around it) is missing, unreadable, not a file or empty."""
    path = Path(file_on_disk(path))
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadSampleError("not a file")
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise BadSampleError("file not found") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, BadSampleError):
            raise
        raise BadSampleError(f"the file cannot be read: {_reason(error)}") from None
    if status.st_size == 0:
        raise BadSampleError("the file is empty")
    return status


def hash_audio(path: Path) -> str:
    """SHA-256 of a recording's bytes, in hex: the same wherever it lies.

    Raises:
        BadSampleError: it lies in a file that does not hold it, or that cannot be read.
    """
    if split_name(path) is None:
        return hash_file(path)
    try:
        with open_audio(path) as file:
            return hash_stream(file)
    except OSError as error:
        raise BadSampleError(f"the file around it cannot be read: {_reason(error)}") from None


def check_header(source: AudioSource, segment: Segment, limits: AudioLimits) -> float:
    """Check what the header tells, without decoding; the length of the segment in seconds.

    Raises:
        BadSampleError: not a known audio format, a wrong channel layout, a cut-off file, a segment outside the audio,
            or a length outside `limits`.
    """
    with _open(source) as file:
        _check_layout(file)
        _check_complete(source)
        start, stop = _segment_frames(file, segment)
        seconds = (stop - start) / file.samplerate
    limits.check(seconds)
    return seconds


def decode(source: AudioSource, segment: Segment, *, sampling_rate: int) -> np.ndarray:
    """Mono float32 samples of a segment at `sampling_rate`; channels are averaged.

    Raises:
        BadSampleError: as `check_header`; or the audio cannot be decoded to its end, is not finite, or is silent.
    """
    samples, native_rate = read_frames(source, segment)
    mono = samples.mean(axis=1)
    _check_signal(mono)
    return _resample(mono, native_rate, sampling_rate)


def read_frames(source: AudioSource, segment: Segment) -> tuple[np.ndarray, int]:
    """The samples of a segment as the file has them, [frames, channels] float32, and their rate.

    Raises:
        BadSampleError: as `check_header`; or the audio cannot be decoded to its end.
    """
    with _open(source) as file:
        _check_layout(file)
        _check_complete(source)
        start, stop = _segment_frames(file, segment)
        try:
            file.seek(start)
            samples = file.read(stop - start, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise BadSampleError(f"the audio cannot be decoded: {_reason(error)}") from None
        native_rate = file.samplerate
    if len(samples) < stop - start:
        raise BadSampleError(f"truncated: {len(samples)} of {stop - start} samples could be decoded")
    return samples, native_rate


def _open(source: AudioSource) -> soundfile.SoundFile:
    try:
        if isinstance(source, Path) and split_name(source) is None:
            return soundfile.SoundFile(str(source))
        return soundfile.SoundFile(_as_file(source))
    except BadSampleError:
        raise
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        expected = "WAV, FLAC, OGG, Opus or MP3; `ds-higgs manifest` turns m4a, mp4 and others into FLAC by ffmpeg"
        raise BadSampleError(f"the audio cannot be opened: {_reason(error)}", expected) from None


def _as_file(source: AudioSource) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open_audio(source)


def _check_layout(file: soundfile.SoundFile) -> None:
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise BadSampleError(f"the audio has {file.channels} channels", "mono or stereo")
    if file.frames <= 0:
        raise BadSampleError("the audio has no samples")


def _segment_frames(file: soundfile.SoundFile, segment: Segment) -> tuple[int, int]:
    """First frame and frame after the last one. A rounding error of 20 ms at the end is cut off silently."""
    total_seconds = file.frames / file.samplerate

    def to_frames(seconds: float) -> int:
        return round(min(seconds, total_seconds + 1) * file.samplerate)  # beyond the end is refused, however far

    start = to_frames(segment.offset)
    if start >= file.frames:
        raise BadSampleError(f"`offset` {segment.offset:g} s is after the audio's end", f"under {total_seconds:.3f} s")
    if segment.duration is None:
        return start, file.frames
    stop = start + to_frames(segment.duration)
    if stop > file.frames + 0.02 * file.samplerate:
        left = total_seconds - segment.offset
        raise BadSampleError(
            f"`duration` {segment.duration:g} s ends after the audio's end", f"at most {left:.3f} s from this offset"
        )
    if stop == start:
        raise BadSampleError(f"`duration` {segment.duration:g} s holds no sample at {file.samplerate} Hz")
    return start, min(stop, file.frames)


def _check_complete(source: AudioSource) -> None:
    """Refuse a WAV file that is shorter than its header says: libsndfile reads such a file without a word."""
    with _as_file(source) as file:
        riff = file.read(12)
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            return
        while len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                present = _bytes_left(file)
                if size not in UNKNOWN_WAV_SIZES and present < size:
                    raise BadSampleError(f"truncated: {present} of {size} bytes of samples are in the file")
                return
            file.seek(size + size % 2, io.SEEK_CUR)


def _bytes_left(file: BinaryIO) -> int:
    here = file.tell()
    return file.seek(0, io.SEEK_END) - here


def _resample(mono: np.ndarray, native_rate: int, sampling_rate: int) -> np.ndarray:
    """As librosa.resample with "soxr_hq" does it: ceil(samples x ratio) samples."""
    if native_rate != sampling_rate:
        length = -(-len(mono) * sampling_rate // native_rate)
        mono = soxr.resample(mono, native_rate, sampling_rate, quality="HQ")[:length]
        mono = np.pad(mono, (0, length - len(mono)))
    return np.ascontiguousarray(mono, dtype=np.float32)


def _check_signal(mono: np.ndarray) -> None:
    if not np.isfinite(mono).all():
        raise BadSampleError("the audio holds NaN or infinite samples")
    peak = float(np.abs(mono - mono.mean()).max())
    if peak < SILENCE_PEAK:
        level = f"{20 * math.log10(peak):.0f} dBFS" if peak > 0 else "all samples equal"
        raise BadSampleError(f"the audio is silent ({level})")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return getattr(error, "error_string", None) or str(error)
