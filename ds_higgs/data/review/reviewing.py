"""All warnings about the manifests for training and for validation. Reads all their audio: not for a start."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from ds_higgs.data.audio import read_frames
from ds_higgs.data.build import Preparation
from ds_higgs.data.clips import Clip
from ds_higgs.data.code_names import holds_codes
from ds_higgs.data.review.kinds import DataWarning
from ds_higgs.data.review.samples import ReviewedSample, read_samples
from ds_higgs.data.review.set_checks import SET_CHECKS, find_few_speakers, find_leaks
from ds_higgs.data.review.sound import Sound, measure_sound
from ds_higgs.data.review.sound_checks import SOUND_CHECKS
from ds_higgs.data.review.text_checks import TEXT_CHECKS
from ds_higgs.layout import AudioLayout


@dataclass(frozen=True)
class Review:
    """samples: of each manifest, those without a problem; sounds: their clips, by key; warnings: the gravest first."""

    samples: list[list[ReviewedSample]]
    sounds: dict[str, Sound]
    warnings: list[DataWarning]


def review(training: Sequence[Preparation], validation: Sequence[Preparation], layout: AudioLayout) -> Review:
    """Read all texts and all audio of analysed manifests whose audio has been checked, and say what is likely wrong."""
    samples = [read_samples(one, layout) for one in (*training, *validation)]
    sounds: dict[str, Sound] = {}
    for of_manifest in samples:
        sounds |= _measure(heard(of_manifest))
    of_training = list(chain.from_iterable(samples[: len(training)]))
    of_validation = list(chain.from_iterable(samples[len(training) :]))
    return Review(samples, sounds, find_warnings(of_training, of_validation, sounds))


def find_warnings(
    training: Sequence[ReviewedSample], validation: Sequence[ReviewedSample], sounds: Mapping[str, Sound]
) -> list[DataWarning]:
    """What is likely a mistake: the gravest kinds first, then in manifest order; nothing twice."""
    found = [warning for samples in (training, validation) for warning in _check(samples, sounds)]
    found += [*find_few_speakers(training), *find_leaks(heard(training), heard(validation), sounds)]
    return sorted(
        dict.fromkeys(found),
        key=lambda warning: (-warning.weight, warning.kind, warning.file, warning.number or 0),
    )


def _check(samples: Sequence[ReviewedSample], sounds: Mapping[str, Sound]) -> list[DataWarning]:
    found = [warning for check in TEXT_CHECKS for warning in check(samples)]
    for check in (*SOUND_CHECKS, *SET_CHECKS):
        found += check(heard(samples), sounds)
    return found


def heard(samples: Sequence[ReviewedSample]) -> list[ReviewedSample]:
    """Those whose recordings are there: of codes that were made elsewhere nothing is heard."""
    return [one for one in samples if not any(holds_codes(clip.path) for clip in (*one.targets, *one.references))]


def _measure(samples: Sequence[ReviewedSample]) -> dict[str, Sound]:
    """By key, every distinct clip of one manifest, all processors at work. They have been decoded before."""
    clips = {clip.key: clip for sample in samples for clip in (*sample.targets, *sample.references)}

    def measure(clip: Clip) -> Sound:
        return measure_sound(*read_frames(clip.source(samples[0].manifest), clip.segment))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(clips, threads.map(measure, clips.values()), strict=True))
