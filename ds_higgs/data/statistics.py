"""What a manifest holds: counts, hours, speakers, lengths and the share that is learned."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_higgs.data.conditions import PromptParts
from ds_higgs.data.redrawing import References
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.sample_table import SampleTable

PERCENTILES = (5, 50, 95, 100)


@dataclass(frozen=True)
class ManifestStatistics:
    """Of a manifest's samples without a problem.

    audio_hours: of the distinct clips; target_hours, reference_hours: as often as they are used.
    target_seconds, positions: PERCENTILES of a target clip's length, and of a sample's positions in the model.
    target_share: supervised positions / all positions.
    speakers: samples per speaker, most first; samples without one are left out.
    redrawable_samples, redrawable_speakers: whose references `data.reference: redraw` can redraw.
    """

    num_samples: int
    num_text_only: int
    num_clips: int
    audio_hours: float
    target_hours: float
    reference_hours: float
    speakers: dict[str, int]
    target_seconds: dict[str, float]
    positions: dict[str, float]
    positions_per_sample: float
    target_share: float
    redrawable_samples: int
    redrawable_speakers: int


def compute_statistics(samples: SampleTable, keep: np.ndarray, rules: SampleRules) -> ManifestStatistics:
    """Statistics of the samples in the rows `keep`."""
    layout, codec = rules.layout, rules.codec
    positions, supervised = [], 0
    targets: list[float] = []
    references: list[float] = []
    distinct: dict[bytes, float] = {}
    all_seconds, keys = samples.seconds(), samples.keys()
    num_text_only = 0
    for row in keep.tolist():
        tokens, learned = samples.tokens(row)
        uses = slice(samples.first_use(row), samples.first_use(row + 1))
        seconds = all_seconds[uses]
        num_text_only += not len(seconds)
        distinct.update(zip((key.tobytes() for key in keys[uses]), seconds.tolist(), strict=True))
        per_token = layout.count_positions(tokens, codec.count_frames(seconds), seconds)
        positions.append(int(per_token.sum()))
        supervised += int(per_token[learned].sum())
        is_target = layout.audio_targets(tokens, learned)
        targets += seconds[is_target].tolist()
        references += seconds[~is_target].tolist()
    redrawn = _find_references(samples, keep, np.asarray(positions, dtype=np.int32), rules)
    speakers = Counter(speaker for row in keep.tolist() if (speaker := samples.speaker(row)) is not None)
    return ManifestStatistics(
        num_samples=len(keep),
        num_text_only=num_text_only,
        num_clips=len(distinct),
        audio_hours=sum(distinct.values()) / 3600,
        target_hours=sum(targets) / 3600,
        reference_hours=sum(references) / 3600,
        speakers=dict(speakers.most_common()),
        target_seconds=_percentiles(targets),
        positions=_percentiles(positions),
        positions_per_sample=float(np.mean(positions)) if positions else 0.0,
        target_share=supervised / sum(positions) if positions else 0.0,
        redrawable_samples=len(redrawn.rows),
        redrawable_speakers=redrawn.num_speakers,
    )


def _find_references(samples: SampleTable, keep: np.ndarray, positions: np.ndarray, rules: SampleRules) -> References:
    """Of the samples in the rows `keep`, which take so many positions."""
    kept = SampleTable(samples.table.take(keep), samples.audio_root)
    parts = PromptParts.of(rules.tokenizer, rules.layout)
    frames = rules.codec.count_frames(kept.seconds())
    return References(kept, frames, positions, parts=parts, max_tokens=rules.max_tokens)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    names = [f"p{percentile}" for percentile in PERCENTILES]
    found = np.percentile(values, PERCENTILES) if values else np.zeros(len(names))
    return {name: round(float(value), 3) for name, value in zip(names, found, strict=True)}
