"""Texts for utterances that came without one, from a speech recogniser; each is kept as soon as it is known."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ds_higgs.data.audio import Segment, decode, hash_audio
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.errors import UserError
from ds_higgs.files import append_whole, read_json_lines
from ds_higgs.speech.judges import Transcriber

SAMPLING_RATE = 16_000  # of the recognisers
LONGEST_SECONDS = 30.0  # that Whisper hears at once


def check_texts(source: Path, utterances: Sequence[Utterance]) -> None:
    """Raises UserError naming every utterance without a text."""
    without = [f"{one.place}: no text" for one in utterances if not _has_text(one)]
    if without:
        title = f"{source}: {len(without)} recordings have no text; expected one of each, or --transcribe MODEL:"
        raise UserError.from_problems(title, without)


def transcribe_missing(
    utterances: Sequence[Utterance],
    transcriber: Transcriber,
    *,
    record: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Utterance]:
    """The utterances, those without a text with what the recogniser hears.

    Args:
        record: JSON lines of what was heard before, by recording and model: a second call hears only what is new.
        progress: called with the number of recordings heard, and of those to hear.

    Raises:
        UserError: with every recording that cannot be read, is longer than LONGEST_SECONDS, or in which nothing is
            heard.
    """
    known = {
        line["audio"]: line["text"]
        for line in read_json_lines(record)
        if line.get("model") == transcriber.model and line.get("language") == transcriber.language
    }
    problems: list[str] = []
    texts: dict[Path, str] = {}
    waiting = sorted({one.audio for one in utterances if not _has_text(one)})
    for done, audio in enumerate(waiting, start=1):
        try:
            key = hash_audio(audio)
            if key not in known:
                known[key] = _hear(audio, transcriber)
                _remember(record, key, audio, known[key], transcriber)
            texts[audio] = _not_empty(known[key])
        except BadSampleError as error:
            problems.append(f"{audio}: {error}")
        progress(done, len(waiting))
    if problems:
        raise UserError.from_problems(f"{len(problems)} recordings cannot be transcribed:", problems)
    return [one if _has_text(one) else replace(one, text=texts[one.audio]) for one in utterances]


def _has_text(utterance: Utterance) -> bool:
    return bool(utterance.text) or utterance.messages is not None


def _hear(audio: Path, transcriber: Transcriber) -> str:
    waveform = decode(audio, Segment(), sampling_rate=SAMPLING_RATE)
    seconds = len(waveform) / SAMPLING_RATE
    if seconds > LONGEST_SECONDS:
        raise BadSampleError(f"{seconds:.1f} s of audio; expected at most {LONGEST_SECONDS:g} s: cut it at its pauses")
    return " ".join(transcriber.transcribe(waveform, sampling_rate=SAMPLING_RATE).split())


def _not_empty(text: str) -> str:
    if not text:
        raise BadSampleError("nothing was heard in it")
    return text


def _remember(record: Path, key: str, audio: Path, text: str, transcriber: Transcriber) -> None:
    line = {"audio": key, "file": audio.name, "text": text, "model": transcriber.model}
    record.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**line, "language": transcriber.language}, ensure_ascii=False) + "\n"
    append_whole(record, content.encode())
