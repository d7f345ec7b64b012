"""Finds the form of what people bring and reads it. A new form is added to FORMS, and nowhere else."""

from pathlib import Path

from ds_higgs.data.sources import datasets_folder, lines, metadata, nemo, pairs, swift, tables, token_shards, webdataset
from ds_higgs.data.sources.json_lines import SUFFIXES, first_entry
from ds_higgs.data.sources.utterance import Form, Utterance
from ds_higgs.errors import UserError

# The first that finds itself in a source is its form: a folder is read as recordings only where it is nothing else.
FORMS: tuple[Form, ...] = (
    token_shards.FORM,
    *(datasets_folder.FORM, webdataset.FORM, nemo.FORM, lines.FORM, swift.FORM),
    *(metadata.FORM, tables.FORM, pairs.FORM),
)


def find_form(source: Path) -> tuple[Form, Path]:
    """The form of `source` and the file or folder to read.

    Raises:
        UserError: it is missing, or no form fits.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    for form in FORMS:
        if (path := form.find(source)) is not None:
            return form, path
    expected = "; ".join(form.summary for form in FORMS)
    raise UserError(f"{source}: unknown form{_what_it_holds(source)}; expected {expected} (or use --form)")


def _what_it_holds(source: Path) -> str:
    """Of JSON, whose form is told by its first object."""
    if source.suffix.lower() not in SUFFIXES or (entry := first_entry(source)) is None:
        return ""
    if entry.error is not None:
        return f" ({source.name}:{entry.number}: {entry.error})"
    keys = ", ".join(map(repr, entry.data)) if isinstance(entry.data, dict) else ""
    return f" (its first object has {'the keys ' + keys if keys else 'no keys'})"


def named_form(name: str) -> Form:
    """The form of that name, one of FORMS."""
    return next(form for form in FORMS if form.name == name)


def read_utterances(source: Path, form: Form, *, audio_folder: Path, speaker: str | None) -> list[Utterance]:
    """Every utterance of the source.

    Raises:
        UserError: with everything that cannot be used; or there is nothing.
    """
    utterances = form.read(source, audio_folder, speaker)
    if not utterances:
        raise UserError(f"{source}: no utterances found")
    return utterances
