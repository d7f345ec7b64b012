"""One utterance of any form, before it becomes a ChatML sample."""

import os
from dataclasses import dataclass
from pathlib import Path

from ds_higgs.errors import UserError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")


@dataclass(frozen=True)
class Utterance:
    """A recording, what is said in it and by whom.

    place: where it was found, for messages: "list.csv:3".
    reference, reference_text: a recording of the same voice and what it says, where the form names one.
    messages: a sample that is whole already (audio items name files by absolute path); it is then written as it is.
    """

    audio: Path
    text: str
    speaker: str | None
    place: str
    reference: Path | None = None
    reference_text: str | None = None
    messages: tuple[dict, ...] | None = None

    def audio_files(self) -> set[Path]:
        """Every recording that the utterance uses."""
        contents = [message["content"] for message in self.messages or ()]
        items = [item for content in contents if isinstance(content, list) for item in content]
        used = {Path(item["audio_url"]) for item in items if item["type"] == "audio"}
        return used | {self.audio} | ({self.reference} if self.reference else set())


def read_text(path: Path) -> str:
    """A transcript: the file's text on one line.

    Raises:
        UserError: it is missing, empty or not UTF-8.
    """
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the transcript: {error.strerror or error}") from None
    if not text:
        raise UserError(f"{path}: the transcript is empty")
    return text


def existing_file(path: Path, place: str) -> Path:
    """The absolute path. Raises UserError where there is no such file."""
    if not os.path.isfile(path):  # unlike `Path.is_file` without an error for names that no file can have
        raise UserError(f"{place}: audio file not found: {path}")
    return path.resolve()
