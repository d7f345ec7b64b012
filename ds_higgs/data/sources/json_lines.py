"""Forms of JSON lines, or of a JSON array: told from each other by the keys of their first object."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_higgs.data.manifest import Entry, read_manifest
from ds_higgs.data.sources.utterance import Utterance, collect
from ds_higgs.errors import UserError

SUFFIXES = (".jsonl", ".json")


def key_finder(*needed: Collection[str], in_folder: str | None = None) -> Callable[[Path], Path | None]:
    """Finds files whose first object has one key of each group, and folders that hold such a file named `in_folder`."""

    def find(source: Path) -> Path | None:
        path = source / in_folder if source.is_dir() and in_folder is not None else source
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            return None
        entry = first_entry(path)
        keys = entry.data.keys() if entry is not None and isinstance(entry.data, dict) else ()
        return path if all(any(key in keys for key in group) for group in needed) else None

    return find


def first_entry(path: Path) -> Entry | None:
    """The first entry of a file, None where there is none to be had."""
    try:
        return next(read_manifest(path), None)
    except UserError:
        return None


def read_objects(path: Path, build: Callable[[str, dict[str, Any]], Utterance]) -> list[Utterance]:
    """An utterance of every object; `build` takes its place, "list.jsonl:3", and the object.

    Raises:
        UserError: with every object that cannot be used.
    """

    def read(entry: Entry) -> Utterance:
        place = f"{path.name}:{entry.number}"
        if entry.error is not None or not isinstance(entry.data, dict):
            raise UserError(f"{place}: {entry.error or 'expected an object'}")
        return build(place, entry.data)

    return collect(path, read_manifest(path), read, what="objects")


def first_text(place: str, fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the named fields that holds something, on one line; a number is taken as its digits.

    Raises:
        UserError: it is neither text nor number.
    """
    for name in names:
        value = fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: `{name}` must be a string")
        if value and (text := " ".join(value.split())):
            return text
    return None
