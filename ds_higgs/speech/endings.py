"""How speech ends, and whether it goes in circles: from its codes, against those of the recording."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

# Of the recording's length: who reads at half the pace of another still says everything.
EARLY = 0.5
# Codes of the first codebook in a row, a third of a second: a word said again has other ones.
NGRAM = 8
# Share of repeated runs beyond that of the recording, whose pauses repeat a code too.
REPEATS = 0.25

Ending = Literal["in_time", "early", "never"]


@dataclass(frozen=True)
class SpeechEnding:
    """ending: whether the model ended, and not before half the recording's length.

    repeated_share: of the runs of NGRAM codes, those that were there before; repeats: more than the recording does.
    """

    ending: Ending
    repeated_share: float
    repeats: bool


def judge_ending(codes: torch.Tensor, target: torch.Tensor, *, stopped_by: Literal["eos", "length"]) -> SpeechEnding:
    """Judge [codebooks, frames] codes against the recording's."""
    ending: Ending = "in_time"
    if stopped_by == "length":
        ending = "never"
    elif codes.shape[1] < EARLY * target.shape[1]:
        ending = "early"
    share = repeated_share(codes)
    return SpeechEnding(ending, share, repeats=share > repeated_share(target) + REPEATS)


def repeated_share(codes: torch.Tensor) -> float:
    """Share of the runs of NGRAM codes of the first codebook that were there before, 0 to 1; 0 for shorter speech."""
    runs = Counter(map(tuple, codes[0].unfold(0, NGRAM, 1).tolist())) if codes.shape[1] >= NGRAM else Counter()
    return 1 - len(runs) / runs.total() if runs else 0.0


def count_endings(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many samples were spoken, and how many of them never ended, ended early, repeat themselves."""
    endings = Counter(row["ending"] for row in rows)
    return {
        "num_spoken": len(rows),
        "never_ending": endings["never"],
        "early_ending": endings["early"],
        "repeating": sum(row["repeats"] for row in rows),
    }
