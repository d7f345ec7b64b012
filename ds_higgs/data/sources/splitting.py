"""References for utterances, and a held-out share that hears nothing of the training set."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.errors import UserError


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
