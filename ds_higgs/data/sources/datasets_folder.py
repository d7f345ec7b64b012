"""A folder of the Hugging Face `datasets` library: Arrow or Parquet files with an Audio column, or one of codes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ds_higgs.data.containers.opening import name_inside
from ds_higgs.data.containers.tables import CODES_COLUMNS, row_name
from ds_higgs.data.sources.tables import RECORDING_NAMES, SPEAKER_NAMES, TEXT_NAMES
from ds_higgs.data.sources.utterance import FFMPEG_SUFFIXES, Form, Utterance, collect, existing_file
from ds_higgs.errors import UserError
from ds_higgs.files import write_atomically


def is_datasets_folder(folder: Path) -> bool:
    """Whether it holds what `save_to_disk` writes, or Parquet files as on the hub."""
    return any(True for pattern in ("*.arrow", "*.parquet") for _ in folder.rglob(pattern))


def read_datasets_folder(folder: Path, audio_folder: Path, speaker: str | None = None) -> list[Utterance]:
    """All rows. Audio that lies in the table stays there, but for what only ffmpeg reads: it goes to `audio_folder`.

    Raises:
        UserError: a table has no Audio or no text column; or with every row that cannot be used.
    """
    rows = (
        (file, number, f"{file.relative_to(folder)}:{number}", row)
        for file in sorted(path for suffix in ("*.arrow", "*.parquet") for path in folder.rglob(suffix))
        if not file.name.startswith("cache-")
        for number, row in enumerate(_rows(file))
    )
    return collect(folder, rows, lambda row: _utterance(*row, audio_folder, speaker), what="rows")


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows as {"audio": {"bytes", "path"}, "text", "speaker", "recording", "column": the audio's, or the codes'}."""
    try:
        if file.suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=16)
        else:
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            columns = _columns(file, batch.schema)
            column = columns.get("audio") or columns.pop("codes")  # codes stay where they are
            for rows in (batch.slice(start, 16) for start in range(0, len(batch), 16)):
                for row in rows.select(list(columns.values())).to_pylist():
                    yield {name: row[one] for name, one in columns.items()} | {"column": column}
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _columns(file: Path, schema: Any) -> dict[str, str]:
    """Which column is the audio, or codes in its place and the recording's path; the text, the speaker."""
    columns: dict[str, str] = {}
    for field in schema:
        if {"bytes", "path"} <= {inner.name for inner in getattr(field.type, "fields", [])}:
            columns.setdefault("audio", field.name)
    kinds = [("text", TEXT_NAMES), ("speaker", SPEAKER_NAMES)]
    if "audio" not in columns:
        kinds += [("codes", CODES_COLUMNS), ("recording", RECORDING_NAMES)]
    for kind, names in kinds:
        found = next((name for name in names if name in schema.names), None)
        if found is not None:
            columns[kind] = found
    audio = f"an Audio column, or one of codes ({', '.join(CODES_COLUMNS)})"
    for found_kinds, expected in ({"audio", "codes"}, audio), ({"text"}, f"a column {', '.join(TEXT_NAMES)}"):
        if not found_kinds & set(columns):
            raise UserError(f"{file}: columns {', '.join(schema.names)} found, expected {expected}")
    return columns


def _utterance(
    file: Path, number: int, place: str, row: dict[str, Any], audio_folder: Path, speaker: str | None
) -> Utterance:
    audio, text = row.get("audio"), row["text"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: no text")
    if "audio" in row and not (audio and (audio["bytes"] or audio["path"])):
        raise UserError(f"{place}: no audio")
    spoken_by = speaker if speaker is not None else row.get("speaker")
    if audio and not audio["bytes"]:
        found = existing_file(file.parent / audio["path"], place)
    elif audio and Path(audio["path"] or "").suffix.lower() in FFMPEG_SUFFIXES:
        found = _write_audio(audio, audio_folder)
    else:
        found = name_inside(file.resolve(), row_name(row["column"], number))
    return Utterance(
        audio=found,
        text=" ".join(text.split()),
        speaker=None if spoken_by is None else str(spoken_by),
        place=place,
        recording=Path(row["recording"]) if isinstance(row.get("recording"), str) else None,
    )


def _write_audio(audio: dict[str, Any], folder: Path) -> Path:
    name = hashlib.sha256(audio["bytes"]).hexdigest()[:24]
    path = folder / f"{name}{Path(audio['path']).suffix.lower()}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, audio["bytes"])
    return path.resolve()


FORM = Form(
    name="datasets",
    summary="a folder of the datasets library",
    find=lambda source: source if source.is_dir() and is_datasets_folder(source) else None,
    read=read_datasets_folder,
)
