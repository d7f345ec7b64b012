"""A folder of recordings, each with a .txt of the same name beside it; sub-folders are speakers."""

from pathlib import Path

from ds_higgs.data.sources.utterance import AUDIO_SUFFIXES, Form, Utterance, collect, read_text
from ds_higgs.errors import UserError


def read_pairs(folder: Path, speaker: str | None = None) -> list[Utterance]:
    """All recordings below `folder`; the speaker is the first folder below it, or the folder itself.

    A recording without a .txt is an utterance without a text.

    Raises:
        UserError: with every transcript that cannot be read; or there is no recording at all.
    """
    recordings = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not recordings:
        raise UserError(f"{folder}: no recordings found; expected {', '.join(AUDIO_SUFFIXES)} with a .txt beside each")
    return collect(folder, recordings, lambda audio: _utterance(folder, audio, speaker), what="recordings")


def _utterance(folder: Path, audio: Path, speaker: str | None) -> Utterance:
    inside = audio.relative_to(folder)
    of_folder = inside.parts[0] if len(inside.parts) > 1 else folder.resolve().name
    transcript = audio.with_suffix(".txt")
    text = read_text(transcript) if transcript.exists() else ""
    return Utterance(audio.resolve(), text, speaker or of_folder, place=str(inside))


FORM = Form(
    name="pairs",
    summary="a folder of recordings with .txt files",
    find=lambda source: source if source.is_dir() else None,
    read=lambda folder, _, speaker: read_pairs(folder, speaker),
)
