"""Several validation manifests: each has its losses, and all together one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_higgs.adapters.record import LOSSES
from ds_higgs.data.loader import StepLoader
from ds_higgs.training.stop_and_onset import ALL_AVERAGES


@dataclass(frozen=True)
class ValidationSet:
    """One validation manifest; weight: its share in the losses of all."""

    name: str
    loader: StepLoader
    weight: float = 1.0


def combine(found: Sequence[Mapping[str, Any]], sets: Sequence[ValidationSet]) -> dict[str, Any]:
    """The values of an "eval" line from those of every set: of one set its own; of several, weighted means.

    Counts are sums, and losses are means by the sets' weights (of the ends' averages, over the sets that have them);
    "sources" has each set's own, by name.
    """
    if len(sets) == 1:
        return dict(found[0])
    total = sum(one.weight for one in sets)
    shares = [one.weight / total for one in sets]

    def mean(values: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True) if share > 0)

    counts = {key: sum(one[key] for one in found) for key in ("num_text_targets", "num_audio_targets", "num_ends")}
    per_codebook = zip(*(one["audio_loss_per_codebook"] for one in found), strict=True)
    return {
        **{key: mean([one[key] for one in found]) for key in LOSSES},
        "audio_loss_per_codebook": [mean(values) for values in per_codebook],
        **{key: _mean_of_known([one[key] for one in found], shares) for key in ALL_AVERAGES},
        **counts,
        "sources": {one.name: dict(values) for one, values in zip(sets, found, strict=True)},
    }


def _mean_of_known(values: Sequence[float | None], shares: Sequence[float]) -> float | None:
    known = [(share, value) for share, value in zip(shares, values, strict=True) if share > 0 and value is not None]
    total = sum(share for share, _ in known)
    return sum(share / total * value for share, value in known) if known else None


def curves_of(values: Mapping[str, Any]) -> dict[str, float]:
    """What trackers are shown of a step or an evaluation, source by source: "NAME/audio_loss" and so on."""
    sources = values.get("sources", {})
    return {f"{name}/{key}": of_source[key] for name, of_source in sources.items() for key in LOSSES}
