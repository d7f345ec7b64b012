"""Warnings about samples together: copies, leaks, references that do not fit, few speakers."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from ds_higgs.data.review.kinds import LIMITS, DataWarning
from ds_higgs.data.review.samples import ReviewedSample
from ds_higgs.data.review.sound import Sound

Sounds = Mapping[str, Sound]


def find_copies(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    """Targets that an earlier sample has too, with the same text or another."""
    seen: dict[str, ReviewedSample] = {}
    for sample in samples:
        for clip in sample.targets:
            first = seen.setdefault(sounds[clip.key].digest, sample)
            if first is sample:
                continue
            if first.text == sample.text:
                yield sample.warn("duplicate", f"text and recording are those of {first.name}")
            else:
                yield sample.warn("same-audio", f"the recording is that of {first.name}, which has another text")


def find_own_references(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    for sample in samples:
        targets, references = _digests(sample.targets, sounds), _digests(sample.references, sounds)
        if targets & references:
            yield sample.warn("own-reference", "the reference is the target itself: the model learns to copy it")


def find_other_speakers(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    """References that are another speaker's targets."""
    owner = {
        digest: sample.speaker
        for sample in samples
        if sample.speaker is not None
        for digest in _digests(sample.targets, sounds)
    }
    for sample in samples:
        owners = {owner.get(digest) for digest in _digests(sample.references, sounds)} - {None, sample.speaker}
        if sample.speaker is not None and owners:
            yield sample.warn("other-speaker", f"a sample of {sample.speaker}, a reference of {owners.pop()}")


def find_missing_references(samples: Sequence[ReviewedSample], sounds: Sounds) -> Iterator[DataWarning]:
    for sample in samples:
        if sample.targets and not sample.references:
            yield sample.warn("no-reference", "no reference audio: the voice cannot be told from it")


def find_few_speakers(samples: Sequence[ReviewedSample]) -> Iterator[DataWarning]:
    speakers = {sample.speaker for sample in samples if sample.targets} - {None}
    spoken = [sample for sample in samples if sample.targets]
    if spoken and len(speakers) < LIMITS.speakers:
        manifest = spoken[0].manifest
        found = "no sample names its speaker" if not speakers else f"{len(speakers)} speakers in all"
        yield DataWarning("speakers", str(manifest), None, manifest.name, found.replace("1 speakers", "1 speaker"))


def find_leaks(
    training: Sequence[ReviewedSample], validation: Sequence[ReviewedSample], sounds: Sounds
) -> Iterator[DataWarning]:
    """Validation samples whose target is heard in training, as target or as reference."""
    heard: dict[str, tuple[ReviewedSample, str]] = {}
    for sample in training:
        for digest in _digests(sample.references, sounds):
            heard.setdefault(digest, (sample, "a reference"))
    for sample in training:
        for digest in _digests(sample.targets, sounds):
            heard[digest] = (sample, "a target")
    for sample in validation:
        for digest in _digests(sample.targets, sounds) & heard.keys():
            other, what = heard[digest]
            yield sample.warn("leak", f"the target is {what} of {other.name}")


def _digests(clips: Sequence, sounds: Sounds) -> set[str]:
    return {sounds[clip.key].digest for clip in clips}


SET_CHECKS: tuple[Callable[[Sequence[ReviewedSample], Sounds], Iterator[DataWarning]], ...] = (
    *(find_copies, find_own_references, find_other_speakers, find_missing_references),
)
