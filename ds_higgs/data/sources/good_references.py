"""Which recordings make good references: 3 to 10 s long, and clean."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ds_higgs.data.audio import Segment, read_frames
from ds_higgs.data.code_names import holds_codes
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.review.kinds import LIMITS
from ds_higgs.data.review.sound import Sound, measure_sound
from ds_higgs.data.sources.utterance import Utterance

# Seconds: less tells a voice badly, more costs positions in every sample.
SHORTEST, LONGEST = 3.0, 10.0
MAX_HEARD = 50  # recordings of a speaker: more choice than an epoch needs
UNREADABLE = 100  # faults
FEWEST = 2  # of a speaker where none is good: the best ones, so that each has another


def find_good_references(utterances: Sequence[Utterance], *, seed: int) -> set[Path]:
    """Good recordings of every speaker, among MAX_HEARD drawn by seed; where it has too few, the best there are."""
    by_speaker: dict[str | None, list[Path]] = {}
    for utterance in utterances:
        if utterance.messages is None and utterance.reference is None:
            by_speaker.setdefault(utterance.speaker, []).append(utterance.audio)
    good: set[Path] = set()
    for number, recordings in enumerate(by_speaker.values()):
        distinct = sorted(set(recordings))
        order = np.random.default_rng([seed, number]).permutation(len(distinct))[:MAX_HEARD]
        good |= _best([distinct[place] for place in order])
    return good


def _best(recordings: Sequence[Path]) -> set[Path]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        faults = dict(zip(recordings, threads.map(_faults, recordings), strict=True))
    ranked = sorted(recordings, key=lambda audio: faults[audio])
    return {audio for audio in recordings if faults[audio] == (0, 0.0)} | set(ranked[:FEWEST])


def _faults(audio: Path) -> tuple[int, float]:
    """How many, and by how many seconds the length is wrong: (0, 0.0) is a good reference."""
    if holds_codes(audio):  # nobody can hear them
        return 0, 0.0
    try:
        sound = measure_sound(*read_frames(audio, Segment()))
    except BadSampleError:  # `validate` tells why
        return UNREADABLE, 0.0
    return _unclean(sound), max(SHORTEST - sound.seconds, sound.seconds - LONGEST, 0.0)


def _unclean(sound: Sound) -> int:
    return sum(
        (
            sound.clipped_share > LIMITS.clipped_share,
            sound.level_dbfs - sound.noise_dbfs < LIMITS.noise_db,
            not LIMITS.quietest_dbfs <= sound.level_dbfs <= LIMITS.loudest_dbfs,
            sound.rate < LIMITS.lowest_rate,
        )
    )
