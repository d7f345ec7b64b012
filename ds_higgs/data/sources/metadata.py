"""The metadata.json of train-higgs-audio: samples with audio_file, transcript_file and speaker_id."""

from pathlib import Path
from typing import Any

from ds_higgs.data.manifest import parse_json
from ds_higgs.data.sources.utterance import Form, Utterance, collect, existing_file, read_text, suffix_finder
from ds_higgs.errors import UserError


def read_metadata(path: Path, speaker: str | None = None) -> list[Utterance]:
    """The list of samples, alone or under "samples"; optional ref_audio_file with ref_transcript or its file.

    Raises:
        UserError: with every sample that cannot be used.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    samples = data.get("samples") if isinstance(data, dict) else data
    if not isinstance(samples, list) or not samples:
        raise UserError(f"{path}: expected a list of samples, alone or under \"samples\"")  # fmt: skip
    numbered = ((f"{path.name}:{index}", sample) for index, sample in enumerate(samples))
    return collect(path, numbered, lambda one: _utterance(path, *one, speaker), what="samples")


def _utterance(path: Path, place: str, sample: Any, speaker: str | None) -> Utterance:
    if not isinstance(sample, dict) or not isinstance(sample.get("audio_file"), str):
        raise UserError(f"{place}: expected an object with `audio_file`")
    text = _text(path.parent, place, sample, "transcript")
    if text is None:
        raise UserError(f"{place}: no text; expected `transcript_file` or `transcript`")
    spoken_by = speaker or sample.get("speaker_id") or sample.get("speaker_name")
    reference = sample.get("ref_audio_file")
    if reference is not None and not isinstance(reference, str):
        raise UserError(f"{place}: `ref_audio_file` must be a path")
    return Utterance(
        audio=existing_file(path.parent / sample["audio_file"], place),
        text=text,
        speaker=None if spoken_by is None else str(spoken_by),
        place=place,
        reference=existing_file(path.parent / reference, place) if reference else None,
        reference_text=_text(path.parent, place, sample, "ref_transcript") if reference else None,
    )


def _text(folder: Path, place: str, sample: dict, name: str) -> str | None:
    """The text under `name`, or in the file under `name`_file."""
    text, file = sample.get(name), sample.get(f"{name}_file")
    for value in (text, file):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: `{name}` must be a string")
    if text and text.strip():
        return " ".join(text.split())
    if not file:
        return None
    try:
        return read_text(folder / file)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


FORM = Form(
    name="metadata",
    summary="the metadata.json of train-higgs-audio",
    find=suffix_finder(".json", in_folder="metadata.json"),
    read=lambda path, _, speaker: read_metadata(path, speaker),
)
