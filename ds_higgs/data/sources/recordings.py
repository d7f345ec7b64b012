"""Recordings that training cannot read as they are, made into FLAC: other formats by ffmpeg, and parts cut out."""

import hashlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import soundfile

from ds_higgs.data.audio import Segment, hash_audio, read_frames
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.sources.utterance import FFMPEG_SUFFIXES, Utterance
from ds_higgs.errors import UserError
from ds_higgs.files import hash_file

Source = TypeVar("Source")


def make_readable(utterances: Sequence[Utterance], folder: Path) -> list[Utterance]:
    """The utterances with recordings that training reads; what has to be made for that goes to `folder`.

    Files there are named by what they are made of, so a second call makes nothing again.

    Raises:
        UserError: with every recording that cannot be read; or ffmpeg is needed and not there.
    """
    foreign = sorted({audio for one in utterances for audio in one.audio_files() if _needs_ffmpeg(audio)})
    _check_ffmpeg(foreign)
    converted = _make_all(foreign, lambda audio: _convert(audio, folder))
    utterances = [_with_audio(utterance, converted) for utterance in utterances]
    parts = sorted({(one.audio, one.segment) for one in utterances if one.segment is not None}, key=str)
    cut = _make_all(parts, lambda part: _cut(part[0], part[1], folder))
    return [
        replace(one, audio=cut[one.audio, one.segment], segment=None) if one.segment is not None else one
        for one in utterances
    ]


def _needs_ffmpeg(audio: Path) -> bool:
    return audio.suffix.lower() in FFMPEG_SUFFIXES


def _check_ffmpeg(recordings: Sequence[Path]) -> None:
    if not recordings or shutil.which("ffmpeg") is not None:
        return
    shown = f"{recordings[0]}" + (f" and {len(recordings) - 1} more" if len(recordings) > 1 else "")
    raise UserError(
        f"{shown}: reading {recordings[0].suffix} needs ffmpeg, which was not found; expected `ffmpeg` on the PATH "
        "(apt-get install ffmpeg, or conda install ffmpeg), or recordings in WAV, FLAC, OGG, Opus or MP3"
    )


def _with_audio(utterance: Utterance, converted: Mapping[Path, Path]) -> Utterance:
    reference, messages = utterance.reference, utterance.messages
    return replace(
        utterance,
        audio=converted.get(utterance.audio, utterance.audio),
        reference=None if reference is None else converted.get(reference, reference),
        messages=None if messages is None else tuple(_message_with_audio(message, converted) for message in messages),
    )


def _message_with_audio(message: dict, converted: Mapping[Path, Path]) -> dict:
    content = [
        {**item, "audio_url": str(converted.get(Path(item["audio_url"]), item["audio_url"]))}
        if item["type"] == "audio"
        else item
        for item in message["content"]
    ]
    return {**message, "content": content}


def _make_all(sources: Sequence[Source], make: Callable[[Source], Path]) -> dict[Source, Path]:
    """What `make` makes of each source, all processors at work."""
    problems: list[str] = []
    made: dict[Source, Path] = {}

    def attempt(source: Source) -> None:
        try:
            made[source] = make(source)
        except UserError as error:
            problems.append(str(error))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(attempt, sources))
    if problems:
        raise UserError.from_problems(f"{len(problems)} recordings cannot be used:", sorted(problems))
    return made


def _convert(audio: Path, folder: Path) -> Path:
    """The first sound track, mono, as FLAC."""
    out = (folder / f"{hash_file(audio)[:24]}.flac").resolve()
    if out.exists():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    partial = _partial(out)
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", str(audio), "-map", "0:a:0", "-ac", "1"]
    done = subprocess.run(
        [*command, "-sample_fmt", "s16", "-f", "flac", str(partial)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"{audio}: ffmpeg cannot read it: {reason[-1]}")
    os.replace(partial, out)
    return out


def _cut(audio: Path, segment: Segment, folder: Path) -> Path:
    """The part of a recording, at its own rate, as FLAC."""
    name = hashlib.sha256(f"{hash_audio(audio)} {segment.offset} {segment.duration}".encode()).hexdigest()[:24]
    out = (folder / f"{name}.flac").resolve()
    if out.exists():
        return out
    try:
        samples, rate = read_frames(audio, segment)
    except BadSampleError as error:
        raise UserError(f"{audio}, {segment.offset:g} s: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    partial = _partial(out)
    soundfile.write(partial, samples, rate, format="FLAC")
    os.replace(partial, out)
    return out


def _partial(out: Path) -> Path:
    """Where `out` is written first: two recordings may be the same."""
    return out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
