"""Decoding: formats, segments, resampling, and every kind of audio that is not usable."""

import base64
import re

import librosa
import numpy as np
import pytest
import soundfile

from ds_higgs.data.audio import AudioLimits, Segment, check_file, check_header, decode, decode_base64
from ds_higgs.data.problems import BadSampleError

from .audio_files import RATE, tone, write_tone

WHOLE = Segment()
LIMITS = AudioLimits(min_seconds=0.1, max_seconds=5.0)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [16000, 24000, 44100])
def test_formats_and_rates_give_the_same_sound(tmp_path, suffix, rate):
    path = write_tone(tmp_path / f"a.{suffix}", 1.5, rate=rate)
    assert check_header(path, WHOLE, LIMITS) == pytest.approx(1.5, abs=0.06)

    samples = decode(path, WHOLE, sampling_rate=RATE)

    assert samples.dtype == np.float32
    assert samples.ndim == 1
    expected = librosa.resample(tone(1.5, rate=rate), orig_sr=rate, target_sr=RATE)
    assert abs(len(samples) - len(expected)) <= (1500 if suffix == "mp3" else 0)
    spectrum, expected_spectrum = (np.abs(np.fft.rfft(wave[:30000])) for wave in (samples, expected))
    assert np.corrcoef(spectrum, expected_spectrum)[0, 1] > 0.98


def test_resampling_is_librosas(tmp_path):
    path = write_tone(tmp_path / "a.flac", 1.03, rate=22050)
    native, rate = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(
        decode(path, WHOLE, sampling_rate=RATE), librosa.resample(native, orig_sr=rate, target_sr=RATE)
    )


def test_channels_are_averaged(tmp_path):
    left, right = tone(0.5), tone(0.5, pitch=300)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(decode(tmp_path / "a.wav", WHOLE, sampling_rate=RATE), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_a_segment_is_that_part_of_the_whole(tmp_path, suffix):
    path = write_tone(tmp_path / f"a.{suffix}", 2.0)
    whole = decode(path, WHOLE, sampling_rate=RATE)
    np.testing.assert_allclose(decode(path, Segment(0.5, 0.25), sampling_rate=RATE), whole[12000:18000], atol=1e-6)
    np.testing.assert_allclose(decode(path, Segment(1.5), sampling_rate=RATE), whole[36000:], atol=1e-6)


def test_raw_audio_is_the_file_in_base64(tmp_path):
    path = write_tone(tmp_path / "a.flac")
    content = decode_base64(base64.encodebytes(path.read_bytes()).decode())
    np.testing.assert_array_equal(decode(content, WHOLE, sampling_rate=RATE), decode(path, WHOLE, sampling_rate=RATE))
    for wrong in ("%%%", "abc", "ünï"):
        with pytest.raises(BadSampleError, match="not base64"):
            decode_base64(wrong)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(2.0), "`offset` 2 s is after the audio's end"),
        (Segment(0.5, 1.0), "`duration` 1 s ends after the audio's end .expected at most 0.5"),
        (Segment(0.0, 0.05), "too short: 0.050 s"),
    ],
)
def test_segments_outside_the_audio_are_refused(tmp_path, segment, message):
    path = write_tone(tmp_path / "a.wav", 1.0)
    with pytest.raises(BadSampleError) as caught:
        check_header(path, segment, LIMITS)
    assert_message(caught.value, message)


def test_a_rounded_duration_is_not_refused(tmp_path):
    path = write_tone(tmp_path / "a.wav", 1.0)
    assert check_header(path, Segment(0.5, 0.51), LIMITS) == 0.5
    assert len(decode(path, Segment(0.5, 0.51), sampling_rate=RATE)) == 12000


def make_bad_audio(folder, kind):
    path = folder / f"{kind}.wav"
    good = write_tone(folder / "good.wav", 1.0)
    if kind == "text":
        path.write_text("this is no audio")
    elif kind == "wav cut off":
        path.write_bytes(good.read_bytes()[:-10000])
    elif kind == "header only":
        path.write_bytes(good.read_bytes()[:44])
    elif kind == "flac cut off":
        flac = write_tone(folder / "good.flac", 2.0).read_bytes()
        path.write_bytes(flac[: len(flac) // 2])
    elif kind == "flac damaged":
        flac = bytearray(write_tone(folder / "good.flac", 2.0).read_bytes())
        flac[len(flac) // 2 : len(flac) // 2 + 4000] = bytes(4000)
        path.write_bytes(flac)
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), RATE)
    elif kind == "six channels":
        soundfile.write(path, np.ones((RATE, 6)), RATE)
    elif kind == "too short":
        soundfile.write(path, tone(0.05), RATE)
    elif kind == "too long":
        soundfile.write(path, tone(6.0), RATE)
    elif kind == "silent":
        soundfile.write(path, np.zeros(RATE), RATE)
    elif kind == "constant":
        soundfile.write(path, np.full(RATE, 0.5), RATE)
    elif kind == "opposite channels":
        soundfile.write(path, np.stack([tone(1.0), -tone(1.0)], axis=1), RATE)
    elif kind == "nan":
        soundfile.write(path, np.where(np.arange(RATE) == 100, np.nan, tone(1.0)), RATE, subtype="FLOAT")
    return path


BAD_AUDIO = {
    "text": "cannot be opened: .*expected WAV, FLAC, OGG, Opus or MP3; .*m4a",
    "wav cut off": "truncated: 38000 of 48000 bytes",
    "header only": "the audio has no samples|truncated",
    "flac cut off": "truncated|cannot be decoded",
    "flac damaged": "truncated|cannot be decoded",
    "no samples": "the audio has no samples",
    "six channels": "6 channels .expected mono or stereo",
    "too short": "too short: 0.050 s of audio .expected at least 0.1 s",
    "too long": "too long: 6.000 s of audio .expected at most 5 s",
    "silent": "silent .all samples equal",
    "constant": "silent",
    "opposite channels": "silent",
    "nan": "NaN or infinite",
}


@pytest.mark.parametrize("kind", BAD_AUDIO)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_unusable_audio_is_refused(tmp_path, kind, as_bytes):
    path = make_bad_audio(tmp_path, kind)
    source = path.read_bytes() if as_bytes else path
    with pytest.raises(BadSampleError) as caught:
        check_and_decode(source)
    assert_message(caught.value, BAD_AUDIO[kind])


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(1e306), "`offset` 1e.306 s is after the audio's end"),
        (Segment(0.0, 1e306), "`duration` 1e.306 s ends after the audio's end"),
        (Segment(0.5, 1e-9), "`duration` 1e-09 s holds no sample"),
    ],
)
def test_segments_of_absurd_size_are_refused(tmp_path, segment, message):
    path = write_tone(tmp_path / "a.wav", 1.0)
    with pytest.raises(BadSampleError, match=message):
        check_header(path, segment, AudioLimits(min_seconds=0.0))


def test_a_streamed_wav_without_a_size_is_accepted(tmp_path):
    content = bytearray(write_tone(tmp_path / "a.wav", 1.0).read_bytes())
    content[40:44] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(content), WHOLE, sampling_rate=RATE)) == RATE


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.wav").touch()
    for path, message in [
        (tmp_path / "absent.wav", "file not found"),
        (tmp_path / "empty.wav", "the file is empty"),
        (tmp_path, "not a file"),
        (tmp_path / ("x" * 300), "cannot be read: .*name too long"),
        (tmp_path / "null\0byte.wav", "cannot be read: .*null"),
    ]:
        with pytest.raises(BadSampleError, match=message):
            check_file(path)


def check_and_decode(source):
    check_header(source, WHOLE, LIMITS)
    return decode(source, WHOLE, sampling_rate=RATE)


def assert_message(error: BadSampleError, pattern: str) -> None:
    assert re.search(pattern, f"{error.message} (expected {error.expected})"), error.message
