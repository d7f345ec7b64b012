"""OmniVoice's token shards: a data.lst of tar archives with `ID.npy` of codes, each beside JSON lines of the texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_higgs.data.code_names import SUFFIX
from ds_higgs.data.containers.opening import name_inside
from ds_higgs.data.containers.tar import tar_members
from ds_higgs.data.manifest import read_manifest
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.sources.json_lines import first_text
from ds_higgs.data.sources.tables import RECORDING_NAMES, SPEAKER_NAMES, TEXT_NAMES
from ds_higgs.data.sources.utterance import Form, Utterance, collect, suffix_finder
from ds_higgs.errors import UserError
from ds_higgs.files import read_text_lines

LIST_NAME = "data.lst"
NOISY = "clean_start_token_idx"  # of a clip whose beginning had noise added to it


def read_token_shards(path: Path, speaker: str | None = None) -> list[Utterance]:
    """An utterance of every array of codes; those with noise added to them are left out.

    Args:
        path: data.lst, lines of `TAR JSONL SAMPLES SECONDS`.

    Raises:
        UserError: a shard is missing or damaged; or with every array that cannot be used.
    """
    members = (
        (shard, name, texts) for shard, texts in _shards(path) for name in _names(shard) if not _is_noisy(name, texts)
    )
    return collect(path, members, lambda member: _utterance(*member, speaker), what="arrays of codes")


def _shards(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each archive, and what its JSON lines say, by id."""
    for number, line in enumerate(read_text_lines(path), start=1):
        if not line.strip():
            continue
        parts = line.split()
        if len(parts) != 4:
            raise UserError(f"{path.name}:{number}: {len(parts)} parts; expected TAR JSONL SAMPLES SECONDS")
        shard, texts = (_found(path, Path(name), f"{path.name}:{number}") for name in parts[:2])
        yield shard, _read_texts(texts)


def _found(path: Path, file: Path, place: str) -> Path:
    """The file as data.lst has it, else in the same folder beside data.lst: lists name what was there once."""
    choices = (file, path.parent / file, path.parent / file.parent.name / file.name)
    for choice in choices:
        if choice.is_file():
            return choice.resolve()
    raise UserError(f"{place}: file not found: {file}, nor {choices[-1]}")


def _read_texts(file: Path) -> dict[str, Any]:
    found = {}
    for entry in read_manifest(file):
        if entry.error is not None or not isinstance(entry.data, dict) or "id" not in entry.data:
            raise UserError(f"{file.name}:{entry.number}: {entry.error or 'expected an object with `id`'}")
        found[str(entry.data["id"])] = entry.data
    return found


def _names(shard: Path) -> Iterator[str]:
    try:
        for member in tar_members(shard):
            if member.name.endswith(SUFFIX):
                yield member.name
    except (BadSampleError, OSError) as error:
        raise UserError(f"{shard}: {error}") from None


def _is_noisy(name: str, texts: dict[str, Any]) -> bool:
    return NOISY in texts.get(name.removesuffix(SUFFIX), {})


def _utterance(shard: Path, name: str, texts: dict[str, Any], speaker: str | None) -> Utterance:
    place = str(name_inside(shard.name, name))
    fields = texts.get(name.removesuffix(SUFFIX))
    if fields is None:
        raise UserError(f"{place}: its shard's JSON lines have no such `id`")
    text = first_text(place, fields, TEXT_NAMES)
    if not text:
        raise UserError(f"{place}: no text")
    recording = first_text(place, fields, RECORDING_NAMES)
    return Utterance(
        audio=name_inside(shard, name),
        text=text,
        speaker=speaker if speaker is not None else first_text(place, fields, SPEAKER_NAMES),
        place=place,
        recording=None if recording is None else Path(recording),
    )


FORM = Form(
    name="tokens",
    summary="token shards of OmniVoice (data.lst)",
    find=suffix_finder(".lst", in_folder=LIST_NAME),
    read=lambda path, _, speaker: read_token_shards(path, speaker),
)
