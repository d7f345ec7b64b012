"""References for utterances, and a held-out share that hears nothing of the training set."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.errors import UserError


def pick_references(
    utterances: Sequence[Utterance], *, seed: int, good: Collection[Path] = ()
) -> list[tuple[Utterance, Utterance | None]]:
    """Each utterance with another one of its speaker as reference, drawn by seed; None where there is no other.

    Utterances that bring their own reference, or are whole samples, get none. Never the same recording.

    Args:
        good: recordings that make good references: a speaker's others are drawn only where it has no such.
    """
    by_speaker: dict[str | None, list[Utterance]] = {}
    for utterance in utterances:
        if utterance.messages is None:
            by_speaker.setdefault(utterance.speaker, []).append(utterance)
    best_of = {speaker: [one for one in found if one.audio in good] for speaker, found in by_speaker.items()}
    picked: list[tuple[Utterance, Utterance | None]] = []
    for index, utterance in enumerate(utterances):
        other = None
        if _needs_reference(utterance) and utterance.speaker is not None:
            generator = np.random.default_rng([seed, index])
            pools = (best_of[utterance.speaker], by_speaker[utterance.speaker])
            drawn = (_draw_other(utterance, pool, generator) for pool in pools)
            other = next((found for found in drawn if found is not None), None)
        picked.append((utterance, other))
    return picked


def _draw_other(utterance: Utterance, pool: Sequence[Utterance], generator: np.random.Generator) -> Utterance | None:
    """One of the pool that is another recording."""
    if not pool:
        return None
    start = int(generator.integers(len(pool)))
    others = (pool[(start + step) % len(pool)] for step in range(len(pool)))
    return next((other for other in others if other.audio != utterance.audio), None)


def split(utterances: Sequence[Utterance], *, share: float, seed: int) -> tuple[list[Utterance], list[Utterance]]:
    """Training and validation utterances that share no recording, neither as target nor as reference.

    Every speaker is in both, with two utterances at least where it needs references and has four, so that these find
    one; a speaker whose utterances all hang together by a recording stays in the training set.

    Raises:
        UserError: no speaker can be split.
    """
    groups_of: dict[str | None, list[list[int]]] = {}
    for group in _connected(utterances):
        groups_of.setdefault(utterances[group[0]].speaker, []).append(group)
    validation: set[int] = set()
    for number, groups in enumerate(groups_of.values()):
        order = np.random.default_rng([seed, len(utterances), number]).permutation(len(groups))
        in_need = _needs_reference(utterances[groups[0][0]])
        validation.update(_hold_out([groups[place] for place in order], share=share, in_need=in_need))
    if not validation:
        raise UserError(f"--split: {len(utterances)} utterances cannot be split: too many share a recording")
    return (
        [utterance for index, utterance in enumerate(utterances) if index not in validation],
        [utterance for index, utterance in enumerate(utterances) if index in validation],
    )


def _hold_out(groups: Sequence[Sequence[int]], *, share: float, in_need: bool) -> list[int]:
    """About `share` of one speaker's utterances, whole groups of them, and never all.

    Args:
        in_need: whether they need each other as references.
    """
    total = sum(map(len, groups))
    least = 2 if in_need and len(groups) >= 4 else 1
    wanted = max(least, round(share * total))
    held_out: list[int] = []
    for group in groups[:-1]:
        if len(held_out) + len(group) <= wanted:
            held_out += group
    if not held_out and len(groups) > 1:
        smallest = sorted(groups, key=len)[0]
        return [*smallest]
    return held_out


def _needs_reference(utterance: Utterance) -> bool:
    return utterance.reference is None and utterance.messages is None


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
