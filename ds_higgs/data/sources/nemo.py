"""NeMo's manifests: JSON lines of `audio_filepath`, `text` and, for a part of a recording, `offset` and `duration`."""

import math
from pathlib import Path
from typing import Any

from ds_higgs.data.audio import Segment
from ds_higgs.data.sources.json_lines import first_text, key_finder, read_objects
from ds_higgs.data.sources.tables import SPEAKER_NAMES
from ds_higgs.data.sources.utterance import Form, Utterance, existing_file
from ds_higgs.errors import UserError


def read_nemo(path: Path, speaker: str | None = None) -> list[Utterance]:
    """Every line. `duration` is of a part where `offset` is given, else it tells the whole recording's length.

    Raises:
        UserError: with every line that cannot be used.
    """
    return read_objects(path, lambda place, data: _utterance(path.parent, place, data, speaker))


def _utterance(folder: Path, place: str, data: dict[str, Any], speaker: str | None) -> Utterance:
    audio = first_text(place, data, ("audio_filepath",))
    if audio is None:
        raise UserError(f"{place}: no audio; expected `audio_filepath`")
    return Utterance(
        audio=existing_file(folder / audio, place),
        text=first_text(place, data, ("text",)) or "",
        speaker=speaker or first_text(place, data, SPEAKER_NAMES),
        place=place,
        segment=_segment(place, data),
    )


def _segment(place: str, data: dict[str, Any]) -> Segment | None:
    if data.get("offset") is None:
        return None
    duration = data.get("duration")
    for name, value in (("offset", data["offset"]), ("duration", duration)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (is_number and value >= 0):
            raise UserError(f"{place}: `{name}` is {value!r}, expected seconds")
    return Segment(float(data["offset"]), None if duration is None else float(duration))


FORM = Form(
    name="nemo",
    summary="NeMo's JSON lines of audio_filepath",
    find=key_finder(("audio_filepath",)),
    read=lambda path, _, speaker: read_nemo(path, speaker),
)
