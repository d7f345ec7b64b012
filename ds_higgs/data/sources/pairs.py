"""A folder of recordings, each with a .txt of the same name beside it; sub-folders are speakers."""

from pathlib import Path

from ds_higgs.data.sources.utterance import AUDIO_SUFFIXES, Utterance, read_text
from ds_higgs.errors import UserError


def read_pairs(folder: Path, speaker: str | None = None) -> list[Utterance]:
    """All recordings below `folder`; the speaker is the first folder below it, or the folder itself.

    Raises:
        UserError: with every recording that has no transcript; or there is no recording at all.
    """
    utterances, problems = [], []
    for audio in sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES):
        inside = audio.relative_to(folder)
        try:
            text = read_text(audio.with_suffix(".txt"))
        except UserError as error:
            problems.append(str(error))
            continue
        of_folder = inside.parts[0] if len(inside.parts) > 1 else folder.resolve().name
        utterances.append(Utterance(audio.resolve(), text, speaker or of_folder, place=str(inside)))
    if problems:
        raise UserError.from_problems(f"{folder}: {len(problems)} recordings have no usable transcript:", problems)
    if not utterances:
        raise UserError(f"{folder}: no recordings found; expected {', '.join(AUDIO_SUFFIXES)} with a .txt beside each")
    return utterances
