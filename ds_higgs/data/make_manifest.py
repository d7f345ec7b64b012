"""Make a manifest from what people have: find the form, pick references, split, write."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ds_higgs.data.sources.datasets_folder import is_datasets_folder, read_datasets_folder
from ds_higgs.data.sources.metadata import read_metadata
from ds_higgs.data.sources.pairs import read_pairs
from ds_higgs.data.sources.swift import read_swift
from ds_higgs.data.sources.tables import read_table
from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.errors import UserError
from ds_higgs.files import write_atomically

Form = Literal["pairs", "table", "swift", "metadata", "datasets"]
SYSTEM_MESSAGE = (
    "You are a helpful assistant capable of generating speech in the voice of the provided reference audio."
)
REQUEST = "Please generate speech for: "


@dataclass(frozen=True)
class Made:
    """What was written: samples, those among them without a reference, speakers."""

    path: Path
    num_samples: int
    num_without_reference: int
    num_speakers: int


def make_manifests(
    source: Path,
    out: Path,
    *,
    form: Form | None = None,
    share: float | None = None,
    validation: Path | None = None,
    seed: int = 0,
    speaker: str | None = None,
    system: str | None = None,
) -> list[Made]:
    """Write a manifest of `source` to `out`, and one of a held-out share beside it.

    Args:
        share: of the utterances to hold out, 0 to 1; None holds out none.
        validation: where their manifest goes; by default `out` with "-val" in its name.
        speaker: of all utterances, whatever the source says.
        system: text of the system message; None is the usual one, "" is none.

    Raises:
        UserError: the source cannot be used, or the flags do not fit together.
    """
    if share is not None and not 0 < share < 1:
        raise UserError(f"--split: {share} found, expected a share between 0 and 1")
    if share is None and validation is not None:
        raise UserError("--val-out: needs --split")
    found, path = find_form(source) if form is None else (form, source)
    audio_folder = out.parent / f"{out.stem}_audio"
    utterances = read_utterances(path, found, audio_folder=audio_folder, speaker=speaker)
    system = SYSTEM_MESSAGE if system is None else system
    if share is None:
        return [write_manifest(out, utterances, seed=seed, system=system)]
    training, held_out = split(utterances, share=share, seed=seed)
    validation = validation or out.with_name(f"{out.stem}-val{out.suffix}")
    return [
        write_manifest(out, training, seed=seed, system=system),
        write_manifest(validation, held_out, seed=seed, system=system),
    ]


def find_form(source: Path) -> tuple[Form, Path]:
    """The form of `source` and the file or folder to read.

    Raises:
        UserError: it is missing, or no form fits.
    """
    if source.is_dir():
        if is_datasets_folder(source):
            return "datasets", source
        for name, form in (("metadata.json", "metadata"), ("metadata.csv", "table")):
            if (source / name).is_file():
                return form, source / name  # type: ignore[return-value]
        return "pairs", source
    forms: dict[str, Form] = {".json": "metadata", ".jsonl": "swift", ".csv": "table", ".tsv": "table", ".txt": "table"}
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix.lower() not in forms:
        raise UserError(f"{source}: unknown form; expected a folder, .json, .jsonl, .csv, .tsv or .txt (or use --form)")
    return forms[source.suffix.lower()], source


def read_utterances(source: Path, form: Form, *, audio_folder: Path, speaker: str | None) -> list[Utterance]:
    """Every utterance of the source.

    Raises:
        UserError: with everything that cannot be used; or there is nothing.
    """
    if form == "datasets":
        utterances = read_datasets_folder(source, audio_folder, speaker)
    else:
        readers = {"pairs": read_pairs, "table": read_table, "swift": read_swift, "metadata": read_metadata}
        utterances = readers[form](source, speaker)
    if not utterances:
        raise UserError(f"{source}: no utterances found")
    return utterances


def pick_references(utterances: Sequence[Utterance], *, seed: int) -> list[tuple[Utterance, Utterance | None]]:
    """Each utterance with another one of its speaker as reference, drawn by seed; None where there is no other.

    Utterances that bring their own reference, or are whole samples, get none. Never the same recording.
    """
    by_speaker: dict[str | None, list[Utterance]] = {}
    for utterance in utterances:
        if utterance.messages is None:
            by_speaker.setdefault(utterance.speaker, []).append(utterance)
    picked: list[tuple[Utterance, Utterance | None]] = []
    for index, utterance in enumerate(utterances):
        candidates = by_speaker.get(utterance.speaker, []) if utterance.speaker is not None else []
        if utterance.messages is not None or utterance.reference is not None or len(candidates) < 2:
            picked.append((utterance, None))
            continue
        start = int(np.random.default_rng([seed, index]).integers(len(candidates)))
        others = (candidates[(start + step) % len(candidates)] for step in range(len(candidates)))
        picked.append((utterance, next((other for other in others if other.audio != utterance.audio), None)))
    return picked


def split(utterances: Sequence[Utterance], *, share: float, seed: int) -> tuple[list[Utterance], list[Utterance]]:
    """Training and validation utterances that share no recording, neither as target nor as reference.

    Utterances come to the validation set together with all that share a recording with them, and with another one of
    their speaker, so that they find a reference there.

    Raises:
        UserError: all utterances hang together, so that none can be split off.
    """
    groups = _connected(utterances)
    order = np.random.default_rng([seed, len(utterances)]).permutation(len(groups)).tolist()
    waiting = _by_speaker(utterances, groups, order)
    wanted = max(1, round(share * len(utterances)))
    validation: set[int] = set()
    speakers: set[str | None] = set()
    for number in order:
        members = list(groups[number])
        speaker = utterances[members[0]].speaker
        if len(validation) >= wanted or not validation.isdisjoint(members):
            continue
        if _needs_reference(utterances[members[0]]) and speaker not in speakers:
            partner = next((other for other in waiting[speaker] if other != number), None)
            members += groups[partner] if partner is not None else []
        if len(validation) + len(members) <= max(wanted, 2) and len(validation) + len(members) < len(utterances):
            validation.update(members)
            speakers.add(speaker)
    if not validation:
        raise UserError(f"--split: {len(utterances)} utterances cannot be split: too many share a recording")
    return (
        [utterance for index, utterance in enumerate(utterances) if index not in validation],
        [utterance for index, utterance in enumerate(utterances) if index in validation],
    )


def write_manifest(path: Path, utterances: Sequence[Utterance], *, seed: int, system: str) -> Made:
    """Write the utterances as ChatML samples, one JSON line each (.jsonl) or as one array; audio relative to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picked = pick_references(utterances, seed=seed)
    samples = [_sample(utterance, other, path.parent.resolve(), system) for utterance, other in picked]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    else:
        text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, text.encode())
    return Made(
        path=path,
        num_samples=len(samples),
        num_without_reference=sum(not _has_user_audio(sample) for sample in samples),
        num_speakers=len({utterance.speaker for utterance in utterances if utterance.speaker is not None}),
    )


def _sample(utterance: Utterance, other: Utterance | None, folder: Path, system: str) -> dict[str, Any]:
    if utterance.messages is not None:
        messages = [_relative(message, folder) for message in utterance.messages]
    else:
        reference, said = utterance.reference, utterance.reference_text
        if other is not None:
            reference, said = other.audio, other.text
        user: list[dict] = [{"type": "text", "text": said}] if said else []
        if reference is not None:
            user.append({"type": "audio", "audio_url": _path_from(folder, reference)})
        user.append({"type": "text", "text": REQUEST + utterance.text})
        target = {"type": "audio", "audio_url": _path_from(folder, utterance.audio)}
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": utterance.text}, target]},
        ]
        if system:
            messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages} | ({"speaker": utterance.speaker} if utterance.speaker is not None else {})


def _relative(message: dict, folder: Path) -> dict:
    content = [
        {**item, "audio_url": _path_from(folder, Path(item["audio_url"]))} if item["type"] == "audio" else item
        for item in message["content"]
    ]
    return {**message, "content": content}


def _path_from(folder: Path, path: Path) -> str:
    """Relative where the audio lies below the manifest's folder, so that both can be moved together."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _has_user_audio(sample: dict) -> bool:
    users = [message for message in sample["messages"] if message["role"] == "user"]
    return any(item["type"] == "audio" for message in users for item in message["content"])


def _needs_reference(utterance: Utterance) -> bool:
    return utterance.reference is None and utterance.messages is None


def _by_speaker(
    utterances: Sequence[Utterance], groups: Sequence[Sequence[int]], order: Iterable[int]
) -> dict[str | None, list[int]]:
    """The groups of each speaker, in order."""
    found: dict[str | None, list[int]] = {}
    for number in order:
        found.setdefault(utterances[groups[number][0]].speaker, []).append(number)
    return found


def _connected(utterances: Sequence[Utterance]) -> list[list[int]]:
    """Indices grouped so that utterances of different groups share no recording."""
    parent = list(range(len(utterances)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    owner: dict[Path, int] = {}
    for index, utterance in enumerate(utterances):
        for audio in utterance.audio_files():
            parent[root(index)] = root(owner.setdefault(audio, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(utterances)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())
