"""`audio|text` tables, LJSpeech's metadata.csv among them, and the metadata.csv of an audio folder."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_higgs.data.sources.utterance import AUDIO_SUFFIXES, Form, Utterance, collect, existing_file, suffix_finder
from ds_higgs.errors import UserError

AUDIO_NAMES = ("audio", "audio_file", "audio_path", "file_name", "file", "path", "wav", "wav_path", "id")
TEXT_NAMES = ("text", "transcript", "transcription", "sentence", "normalized_text")
RECORDING_NAMES = ("audio_path", "wav_path", "path")  # beside codes: what they were made of
SPEAKER_NAMES = ("speaker", "speaker_id", "speaker_name", "client_id")
AUDIO_FOLDERS = ("", "wavs", "wav", "audio", "clips")


def read_table(path: Path, speaker: str | None = None) -> list[Utterance]:
    """Rows `audio|text`, `id|text|normalized text` (LJSpeech), or named columns under a header line.

    The separator is the first of `|`, tab and comma that stands in the first line. Audio is looked for beside the
    table and in its wavs, wav, audio or clips folder, with or without a suffix.

    Raises:
        UserError: with every line that cannot be used.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the table: {error.strerror}") from None
    lines = list(io.StringIO(text, newline=""))  # not at the other separators of lines that Unicode has
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: the table is empty; expected lines of audio|text")
    delimiter = next((mark for mark in ("|", "\t", ",") if mark in lines[0]), "|")
    # In LJSpeech's own form a quotation mark is part of the text; in comma-separated tables it quotes.
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    try:
        rows = [(number, row) for number, row in _numbered_rows(lines, delimiter, quoting) if any(row)]
    except csv.Error as error:
        raise UserError(f"{path}: not a table: {error}") from None
    columns = _columns(rows[0][1])
    named = (
        (path, number, dict(zip(columns, row, strict=False)) if columns else _unnamed(row))
        for number, row in (rows[1:] if columns else rows)
    )
    return collect(path, named, lambda row: _utterance(*row, speaker), what="lines")


def first_named(fields: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The first of the named fields that holds something."""
    return next((fields[name].strip() for name in names if (fields.get(name) or "").strip()), None)


def _numbered_rows(lines: Sequence[str], delimiter: str, quoting: Any) -> list[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    return [(reader.line_num, row) for row in reader]


def _columns(row: Sequence[str]) -> list[str]:
    """The header's names, or nothing where the first line is data already."""
    names = [name.strip().lower() for name in row]
    return names if set(names) & set(AUDIO_NAMES) and set(names) & set(TEXT_NAMES) else []


def _unnamed(row: Sequence[str]) -> dict[str, str]:
    # LJSpeech: the third field is the text with numbers spelt out, which is what is said.
    text = row[2] if len(row) > 2 and row[2].strip() else row[1] if len(row) > 1 else ""
    return {"audio": row[0], "text": text}


def _utterance(table: Path, number: int, fields: Mapping[str, str], speaker: str | None) -> Utterance:
    place = f"{table.name}:{number}"
    audio, text = first_named(fields, AUDIO_NAMES), first_named(fields, TEXT_NAMES)
    if audio is None or text is None:
        raise UserError(f"{place}: {'no audio' if audio is None else 'no text'}; expected audio|text")
    found = existing_file(_locate(table.parent, audio), place)
    return Utterance(found, text, speaker or first_named(fields, SPEAKER_NAMES) or table.resolve().parent.name, place)


def _locate(folder: Path, name: str) -> Path:
    candidates = [folder / inside / f"{name}{suffix}" for inside in AUDIO_FOLDERS for suffix in ("", *AUDIO_SUFFIXES)]
    return next((path for path in candidates if os.path.isfile(path)), folder / name)


FORM = Form(
    name="table",
    summary="an audio|text table",
    find=suffix_finder(".csv", ".tsv", ".txt", in_folder="metadata.csv"),
    read=lambda path, _, speaker: read_table(path, speaker),
)
