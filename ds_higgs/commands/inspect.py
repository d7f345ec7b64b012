"""`ds-higgs inspect`: what a page needs to show a manifest's samples, the doubtful ones first."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ds_higgs import setup
from ds_higgs.config import Config
from ds_higgs.data.build import Preparation
from ds_higgs.data.problems import Problem
from ds_higgs.data.review.kinds import DataWarning
from ds_higgs.data.review.reviewing import heard, review
from ds_higgs.data.review.samples import ReviewedSample
from ds_higgs.data.review.sound import Sound
from ds_higgs.data.rules import SampleRules
from ds_higgs.errors import UserError
from ds_higgs.job.logs import phase
from ds_higgs.model.loading import resolve_base


@dataclass(frozen=True)
class InspectedSample:
    """A sample, its warnings, and its score: the sum of the warnings' weights."""

    sample: ReviewedSample
    warnings: tuple[DataWarning, ...]
    score: int


@dataclass(frozen=True)
class Inspection:
    """samples: the worst first, those without a warning in manifest order; problems: of samples that cannot be shown.

    general: warnings about whole manifests; sounds: the samples' clips, by key.
    """

    manifests: tuple[Path, ...]
    samples: list[InspectedSample]
    sounds: dict[str, Sound]
    warnings: list[DataWarning]
    general: list[DataWarning]
    problems: list[Problem]
    num_excluded: int

    @property
    def seconds(self) -> float:
        """Of all targets."""
        return sum(self.sounds[clip.key].seconds for one in self.samples for clip in one.sample.targets)

    def speakers(self) -> list[tuple[str, int]]:
        """Samples of each speaker, most first."""
        return Counter(one.sample.speaker for one in self.samples if one.sample.speaker is not None).most_common()


def inspect(config: Config) -> Inspection:
    """Check all manifests as `validate` does, and bring their samples in order. Encodes nothing.

    Raises:
        UserError: the base checkpoint or a manifest cannot be read, no sample can be used, or the audio is elsewhere.
    """
    if config.data.audio == "elsewhere":
        raise UserError("data.audio: elsewhere, but the page plays the recordings; expected here")
    rules = setup.build_sample_rules(config.data, resolve_base(config.model.base, config.model.revision))
    preparations = [_prepare(config, *one) for one in setup.manifests_with_rules(config.data, rules)]
    count = len(config.data.train_sources)
    with phase("listening to the recordings"):
        found = review(preparations[:count], preparations[count:], rules.layout)
    samples = [sample for of_manifest in found.samples for sample in of_manifest]
    if not samples:
        raise UserError(f"{preparations[0].manifest}: no sample can be used; `ds-higgs validate` tells why")
    if len(heard(samples)) < len(samples):
        raise UserError("the page plays recordings, and some samples have codes in their place; expected audio in all")
    return Inspection(
        manifests=tuple(one.manifest for one in preparations),
        samples=_worst_first(samples, found.warnings),
        sounds=found.sounds,
        warnings=found.warnings,
        general=[warning for warning in found.warnings if warning.number is None],
        problems=sorted(problem for one in preparations for problem in one.problems),
        num_excluded=sum(one.num_excluded for one in preparations),
    )


def _prepare(config: Config, manifest: Path, rules: SampleRules) -> Preparation:
    preparation = Preparation(manifest, rules=rules, cache_dir=setup.code_cache_dir(config.data))
    with phase(f"checking {manifest.name}"):
        preparation.analyse()
        preparation.encode()
    return preparation


def _worst_first(samples: list[ReviewedSample], warnings: list[DataWarning]) -> list[InspectedSample]:
    of: dict[tuple[str, int | None], list[DataWarning]] = {}
    for warning in warnings:
        of.setdefault((warning.file, warning.number), []).append(warning)
    inspected = []
    for sample in samples:
        found = tuple(of.get((str(sample.manifest), sample.number), ()))
        inspected.append(InspectedSample(sample, found, sum(warning.weight for warning in found)))
    return sorted(inspected, key=lambda one: -one.score)
