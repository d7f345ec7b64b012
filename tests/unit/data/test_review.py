"""Warnings: each planted fault is named at its sample, and clean recordings have none."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ds_higgs.commands.manifest import make_manifests
from ds_higgs.data.build import Preparation
from ds_higgs.data.review.kinds import KINDS, LIMITS
from ds_higgs.data.review.reviewing import find_warnings, review
from ds_higgs.data.review.sound import OUTLINE_POINTS, measure_sound
from ds_higgs.data.review.text_checks import TEXT_CHECKS, count_letters, mojibake_in
from tests.support.planted_faults import EXPECTED, write_planted

RATE = 24_000


@pytest.fixture(scope="module")
def review_of(make_rules, tmp_path_factory):
    """The review of a training and a validation manifest."""

    def run(*manifests: Path):
        rules = make_rules()
        preparations = [
            Preparation(path, rules=rules, cache_dir=tmp_path_factory.mktemp("codes")) for path in manifests
        ]
        for preparation in preparations:
            preparation.analyse()
            preparation.encode()
            assert preparation.problems == []
        return review(preparations[:1], preparations[1:], rules.layout)

    return run


@pytest.fixture(scope="module")
def clean(review_of, example_dir):
    return review_of(example_dir / "train.json", example_dir / "val.json")


def test_every_planted_fault_is_named_and_nothing_else(review_of, example_dir, tmp_path):
    assert len(EXPECTED) >= 20
    found: dict[str, set[str]] = {}
    warnings = review_of(*write_planted(tmp_path, example_dir)).warnings
    for warning in warnings:
        found.setdefault(warning.sample, set()).add(warning.kind)
    assert {sample: kind for sample, kind in EXPECTED.items() if kind not in found.get(sample, ())} == {}
    assert found.keys() == EXPECTED.keys()
    assert [warning.weight for warning in warnings] == sorted((w.weight for w in warnings), reverse=True)
    assert set(KINDS) == set(EXPECTED.values()) | {"speakers"}


def test_the_example_is_clean(clean):
    assert [str(warning) for warning in clean.warnings] == []
    assert [len(samples) for samples in clean.samples] == [24, 8]
    assert len(clean.sounds) == 32


def test_few_speakers_are_told_once(clean):
    training = [sample for sample in clean.samples[0] if sample.speaker == "speaker_001"]
    (warning,) = find_warnings(training, [], clean.sounds)
    assert (warning.kind, warning.sample, warning.number) == ("speakers", "train.json", None)
    nameless = [dataclasses.replace(sample, speaker=None) for sample in training]
    (warning,) = find_warnings(nameless, [], clean.sounds)
    assert warning.message == "no sample names its speaker"


def test_what_most_samples_do_is_no_warning(clean):
    """Requests that say something else by design, vowel marks in all texts."""
    different = [dataclasses.replace(sample, request="Say it again.") for sample in clean.samples[0]]
    marked = [dataclasses.replace(sample, text=sample.text + "\u064e" * 20) for sample in clean.samples[0]]
    for samples in (different, marked):
        assert [warning for check in TEXT_CHECKS for warning in check(samples)] == []


@pytest.mark.parametrize(
    ("text", "meant"),
    [("CafÃ©", "é"), ("donâ€™t", "’"), ("Ø³Ù„Ø§Ù…", "سلام"), ("ÇáÓáÇã", "السلام"), ("ï»¿x", "\ufeff")],
)
def test_wrong_encodings_are_read_back(text, meant):
    found = mojibake_in(text)
    assert found is not None
    assert found[1] == meant


@pytest.mark.parametrize("text", ["Ça va, où êtes-vous ?", "naïve Übergröße", "“quoted” – dashed…", "سلام", "Ærø på ø"])
def test_accents_are_no_wrong_encoding(text):
    assert mojibake_in(text) is None


def test_letters_are_counted_by_script():
    assert count_letters("Hello, 42!") == ("LATIN", 5 + 6)
    assert count_letters("سَلَامٌ") == ("ARABIC", 4)
    assert count_letters("...") == ("", 0)


def test_a_sound_is_measured():
    time = np.arange(2 * RATE) / RATE
    speech = 0.25 * np.sin(2 * np.pi * 200 * time) * (np.sin(2 * np.pi * 2 * time) > 0)
    samples = np.concatenate([np.zeros(RATE), speech, np.zeros(RATE // 2)]).astype(np.float32)[:, None]
    sound = measure_sound(samples, RATE)
    assert sound.lead_seconds == pytest.approx(1.0, abs=0.03)
    assert sound.tail_seconds == pytest.approx(0.75, abs=0.03)  # the last quarter second of speech is silent too
    assert sound.level_dbfs == pytest.approx(20 * np.log10(0.25 / np.sqrt(2)), abs=0.3)
    assert sound.clipped_share < LIMITS.clipped_share / 10
    assert measure_sound(np.clip(samples, -0.2, 0.2), RATE).clipped_share > 0.05
    assert len(sound.outline) == OUTLINE_POINTS
    assert max(sound.outline) == 100
    stereo = np.repeat(samples, 2, axis=1)
    assert measure_sound(stereo, RATE).level_dbfs == pytest.approx(sound.level_dbfs)
    assert measure_sound(samples[:10], RATE).seconds == pytest.approx(10 / RATE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng is installed")
def test_two_hundred_clean_recordings_have_no_warning(tmp_path, review_of):
    """Eight voices, English and Arabic, through `ds-higgs manifest`; some have pauses, some have not."""
    texts = {
        language: sorted(
            {
                message["content"][0]["text"]
                for name in ("train", "val")
                for sample in json.loads((EXAMPLE / f"{name}.json").read_text())
                for message in sample["messages"][2:]
                if sample["speaker"] in speakers
            }
        )
        for language, speakers in {"en": ("speaker_001", "speaker_002"), "ar": ("speaker_003", "speaker_004")}.items()
    }
    for number, voice in enumerate(("en+m3", "en+f3", "en-us+m7", "en-us+f2", "ar+m7", "ar+f4", "ar+m1", "ar+f1")):
        for index in range(25):
            known = texts[voice[:2]]
            said = [known[(index * (step + 1) + 5 * step) % len(known)] for step in range(1 + index % 3)]
            path = tmp_path / "in" / voice / f"{index}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            settings = ["-v", voice, "-p", str(30 + 5 * number), "-s", str(150 + 4 * number)]
            subprocess.run(["espeak-ng", *settings, "-w", path, f"{' '.join(said)}"], check=True)
            # One text is spoken twice by a voice at times: with a pause of its own it is another recording.
            path.with_suffix(".txt").write_text(" ".join(said))
    made = make_manifests(tmp_path / "in", tmp_path / "train.json", share=0.1)
    assert sum(manifest.num_samples for manifest in made) == 200
    assert [str(warning) for warning in review_of(*(manifest.path for manifest in made)).warnings] == []


EXAMPLE = Path(__file__).parents[3] / "examples" / "voice_cloning"
