"""`ds-higgs manifest`: a manifest from what people have."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ds_higgs.data.code_names import holds_codes
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.prompt_forms import PromptForm
from ds_higgs.data.sources import pairs
from ds_higgs.data.sources.codec_check import name_codec
from ds_higgs.data.sources.opening import find_form, named_form, read_utterances
from ds_higgs.data.sources.ownership import check_may_overwrite
from ds_higgs.data.sources.recordings import make_readable
from ds_higgs.data.sources.splitting import split
from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.data.sources.writing import Made, write_manifest
from ds_higgs.errors import UserError
from ds_higgs.speech.judges import Transcriber
from ds_higgs.speech.transcribing import check_texts, transcribe_missing


@dataclass(frozen=True)
class Recogniser:
    """What writes down recordings: a model of transformers, its language (None: it guesses), a device."""

    model: str
    language: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Codec:
    """Whose codes a source's codes are: a codec's folder or hub id; trust: without a look."""

    name: str | None = None
    trust: bool = False


def make_manifests(
    source: Path,
    out: Path,
    *,
    form: str | None = None,
    share: float | None = None,
    validation: Path | None = None,
    seed: int = 0,
    speaker: str | None = None,
    system: str | None = None,
    recogniser: Recogniser | None = None,
    codec: Codec = Codec(),
    force: bool = False,
    prompt_form: PromptForm = "as_is",
) -> list[Made]:
    """Write a manifest of `source` to `out`, and one of a held-out share beside it.

    Args:
        form: name of the source's form, where its own name does not tell.
        share: of the utterances to hold out, 0 to 1; None holds out none.
        validation: where their manifest goes; by default `out` with "-val" in its name.
        speaker: of all utterances, whatever the source says.
        system: text of the system message; None is the prompt form's own, "" is none.
        recogniser: for recordings without a text; None refuses them.
        codec: of a source that holds codes in place of audio.
        force: write over files that are no manifests of ours.
        prompt_form: in which the samples ask for speech.

    Raises:
        UserError: the source cannot be used, or the flags do not fit together.
    """
    if share is not None and not 0 < share < 1:
        raise UserError(f"--split: {share} found, expected a share between 0 and 1")
    if share is None and validation is not None:
        raise UserError("--val-out: needs --split")
    validation = validation or out.with_name(f"{out.stem}-val{out.suffix}")
    if not force:
        check_may_overwrite(out, "--out")
        if share is not None:
            check_may_overwrite(validation, "--val-out")
    found, path = find_form(source) if form is None else (named_form(form), source)
    audio_folder = out.parent / f"{out.stem}_audio"
    utterances = read_utterances(path, found, audio_folder=audio_folder, speaker=speaker)
    if any(holds_codes(one.audio) for one in utterances):
        utterances = name_codec(source, utterances, find_codec(codec.name), trust=codec.trust)
    if recogniser is None:
        check_texts(source, utterances)
    utterances = make_readable(utterances, audio_folder)
    if recogniser is not None:
        utterances = _transcribe(utterances, recogniser, audio_folder)
    if share is None:
        return [write_manifest(out, utterances, seed=seed, system=system, form=prompt_form)]
    training, held_out = split(utterances, share=share, seed=seed)
    return [
        write_manifest(out, training, seed=seed, system=system, form=prompt_form),
        write_manifest(validation, held_out, seed=seed, system=system, form=prompt_form),
    ]


def describe_made(source: Path, made: Sequence[Made]) -> Iterator[str]:
    """Lines on the manifests made of `source`: how much is in them, and how its speakers were counted."""
    for one in made:
        without = f", {one.num_without_reference} without a reference" if one.num_without_reference else ""
        speakers = f"{one.num_speakers} speaker" + "s" * (one.num_speakers != 1)
        yield f"{one.path}: {one.num_samples} samples of {speakers}{without}"
    if len(made) == 2 and (only := sorted(made[0].speakers - made[1].speakers)):
        yield f"in training only, for want of recordings: {', '.join(only)}"
    folder = source.resolve().name
    if source.is_dir() and find_form(source)[0] is pairs.FORM and folder in made[0].speakers:
        yield (
            f"speakers are counted by sub-folder, and what lies in {source} itself is one, {folder}; where it is "
            "several people, give each a sub-folder: a sample's reference has to be another recording of its speaker"
        )


def _transcribe(utterances: Sequence[Utterance], recogniser: Recogniser, audio_folder: Path) -> list[Utterance]:
    transcriber = Transcriber(recogniser.model, language=recogniser.language, device=recogniser.device)
    with tqdm(unit="recording", desc="transcribing", dynamic_ncols=True, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        record = audio_folder / "transcripts.jsonl"
        return transcribe_missing(utterances, transcriber, record=record, progress=show)
