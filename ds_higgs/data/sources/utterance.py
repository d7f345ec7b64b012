"""One utterance of any form, before it becomes a ChatML sample."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ds_higgs.data.audio import Segment
from ds_higgs.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# What training reads as it is, and what `recordings` makes FLAC of by ffmpeg.
READABLE_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")
FFMPEG_SUFFIXES = (".m4a", ".mp4", ".aac", ".webm", ".mkv", ".mov", ".wma", ".amr", ".3gp")
AUDIO_SUFFIXES = (*READABLE_SUFFIXES, *FFMPEG_SUFFIXES)


@dataclass(frozen=True)
class Utterance:
    """A recording, what is said in it and by whom.

    text: "" where the form brings none; it is then transcribed, or refused.
    place: where it was found, for messages: "list.csv:3".
    segment: the part of the recording that is meant; None is all of it.
    recording: where `audio` holds codes (`data.codes`), what they were made of, if that is known.
    codec: the name of the codec that they are of.
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
    segment: Segment | None = None
    recording: Path | None = None
    codec: str | None = None

    def audio_files(self) -> set[Path]:
        """Every recording that the utterance uses."""
        contents = [message["content"] for message in self.messages or ()]
        items = [item for content in contents if isinstance(content, list) for item in content]
        used = {Path(item["audio_url"]) for item in items if item["type"] == "audio"}
        return used | {self.audio} | ({self.reference} if self.reference else set())


@dataclass(frozen=True)
class Form:
    """One form of what people have. `opening.FORMS` lists them all.

    summary: of what a source of this form is, for `--help`.
    find: the file or folder to read where a source is of this form by its name and content, else None.
    read: every utterance of it. Takes the path, the folder for audio that lies inside it, and a speaker for all.
    """

    name: str
    summary: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, Path, str | None], list[Utterance]]


def collect(source: Path, items: Iterable[Item], build: Callable[[Item], Result], *, what: str) -> list[Result]:
    """What `build` makes of each item: an utterance, or a sample.

    Raises:
        UserError: with every item (`what` names them: "lines") that cannot be used.
    """
    built, problems = [], []
    for item in items:
        try:
            built.append(build(item))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError.from_problems(f"{source}: {len(problems)} {what} cannot be used:", problems)
    return built


def suffix_finder(*suffixes: str, in_folder: str | None = None) -> Callable[[Path], Path | None]:
    """Finds files by suffix, and folders that hold a file named `in_folder`."""

    def find(source: Path) -> Path | None:
        if source.is_dir():
            return source / in_folder if in_folder is not None and (source / in_folder).is_file() else None
        return source if source.suffix.lower() in suffixes else None

    return find


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
