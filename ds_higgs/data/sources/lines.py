"""JSON lines of `audio` and `text`, with `ref_audio` and `ref_text` where a line brings its own reference."""

from pathlib import Path
from typing import Any

from ds_higgs.data.sources.json_lines import first_text, key_finder, read_objects
from ds_higgs.data.sources.tables import SPEAKER_NAMES, TEXT_NAMES
from ds_higgs.data.sources.utterance import Form, Utterance, existing_file
from ds_higgs.errors import UserError

AUDIO_NAMES = ("audio", "audio_path", "wav", "wav_path", "file_name", "path")
REFERENCE_NAMES = ("ref_audio", "reference_audio", "prompt_audio", "prompt_wav")
REFERENCE_TEXT_NAMES = ("ref_text", "reference_text", "prompt_text")


def read_lines(path: Path, speaker: str | None = None) -> list[Utterance]:
    """Every line; one without a text is an utterance without a text.

    Raises:
        UserError: with every line that cannot be used.
    """
    return read_objects(path, lambda place, data: _utterance(path.parent, place, data, speaker))


def _utterance(folder: Path, place: str, data: dict[str, Any], speaker: str | None) -> Utterance:
    audio = first_text(place, data, AUDIO_NAMES)
    if audio is None:
        raise UserError(f"{place}: no audio; expected `audio`")
    reference = first_text(place, data, REFERENCE_NAMES)
    return Utterance(
        audio=existing_file(folder / audio, place),
        text=first_text(place, data, TEXT_NAMES) or "",
        speaker=speaker or first_text(place, data, SPEAKER_NAMES),
        place=place,
        reference=existing_file(folder / reference, place) if reference else None,
        reference_text=first_text(place, data, REFERENCE_TEXT_NAMES) if reference else None,
    )


FORM = Form(
    name="lines",
    summary="JSON lines of audio, text, ref_audio, ref_text",
    find=key_finder(AUDIO_NAMES, in_folder="metadata.jsonl"),
    read=lambda path, _, speaker: read_lines(path, speaker),
)
