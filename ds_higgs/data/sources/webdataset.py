"""WebDataset shards: tar archives in which `NAME.flac` lies beside `NAME.txt`, or `NAME.json` with text and speaker."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_higgs.data.containers.opening import name_inside, open_audio
from ds_higgs.data.containers.tar import tar_members
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.sources.json_lines import first_text
from ds_higgs.data.sources.tables import SPEAKER_NAMES, TEXT_NAMES
from ds_higgs.data.sources.utterance import READABLE_SUFFIXES, Form, Utterance, collect
from ds_higgs.errors import UserError

_MAX_TEXT_BYTES = 1 << 20


@dataclass
class _Group:
    """The members of one name: what lies before the first dot of the last part of their paths."""

    shard: Path
    name: str
    suffixes: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        return str(name_inside(self.shard.name, self.name))

    def member(self, *suffixes: str) -> Path | None:
        """The first member that ends so."""
        found = next((one for one in self.suffixes if one.lower() in suffixes), None)
        return None if found is None else name_inside(self.shard, f"{self.name}{found}")


def read_shards(source: Path, speaker: str | None = None) -> list[Utterance]:
    """All recordings of a shard, or of all in a folder; they stay where they are.

    Raises:
        UserError: a shard cannot be read; or with every recording that cannot be used.
    """
    shards = sorted(source.rglob("*.tar")) if source.is_dir() else [source]
    groups = (group for shard in shards for group in _groups(shard.resolve()))
    return collect(source, groups, lambda group: _utterance(group, speaker), what="recordings")


def _groups(shard: Path) -> Iterator[_Group]:
    """WebDataset's rule: members of one name come one after another."""
    group: _Group | None = None
    try:
        for member in tar_members(shard):
            folder, slash, file = member.name.rpartition("/")
            stem, dot, suffix = file.partition(".")
            name = f"{folder}{slash}{stem}"
            if group is None or group.name != name:
                if group is not None:
                    yield group
                group = _Group(shard, name)
            group.suffixes.append(dot + suffix)
    except (BadSampleError, OSError) as error:
        raise UserError(f"{shard}: {error}") from None
    if group is not None:
        yield group


def _utterance(group: _Group, speaker: str | None) -> Utterance:
    audio, described = group.member(*READABLE_SUFFIXES), group.member(".json")
    if audio is None:
        expected = ", ".join(READABLE_SUFFIXES)
        raise UserError(f"{group.place}: no audio among {', '.join(group.suffixes)}; expected {expected}")
    fields = {} if described is None else _read_json(described, group.place)
    text_file = group.member(".txt")
    text = first_text(group.place, fields, TEXT_NAMES) if text_file is None else _read_text(text_file, group.place)
    if not text:
        raise UserError(f"{group.place}: no text; expected {group.name}.txt, or {TEXT_NAMES[0]!r} in {group.name}.json")
    spoken_by = speaker if speaker is not None else first_text(group.place, fields, SPEAKER_NAMES)
    return Utterance(audio=audio, text=text, speaker=spoken_by, place=group.place)


def _read_text(member: Path, place: str) -> str:
    with open_audio(member) as file:
        content = file.read(_MAX_TEXT_BYTES)
    try:
        return " ".join(content.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: the text is not UTF-8: byte 0x{content[error.start]:02x}") from None


def _read_json(member: Path, place: str) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(member, place))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}.json: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{place}.json: expected an object")
    return found


def _find(source: Path) -> Path | None:
    if source.is_dir():
        return source if next(source.rglob("*.tar"), None) is not None else None
    return source if source.suffix.lower() == ".tar" else None


FORM = Form(
    name="webdataset",
    summary="a WebDataset shard (.tar) or a folder of them",
    find=_find,
    read=lambda path, _, speaker: read_shards(path, speaker),
)
