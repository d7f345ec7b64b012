"""The small base that speaks: its recordings are what the scripts write, and the measures hear what they should."""

import importlib
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import soundfile

from ds_higgs.data.codec.opening import load_codec
from ds_higgs.model.tiny_tokenizer import build_tiny_tokenizer
from tests.support.launching import ROOT

FOLDER = ROOT / "examples" / "small_base"
RATE = 24_000


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The folder's scripts as modules, by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("speech", "make_speech", "make_recordings", "make_base", "listening", "judge")
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.pop(0)


def spoken_texts(samples: list[dict]) -> set[str]:
    return {message["content"] for sample in samples for message in sample["messages"] if message["role"] == "user"}


def read(name: str) -> np.ndarray:
    return soundfile.read(FOLDER / name, dtype="float32")[0]


def test_recordings_and_manifests_are_those_of_the_script(scripts):
    utterances, manifests = scripts["make_recordings"].build_all(FOLDER)
    assert {one.file for one in utterances} == {*FOLDER.glob("*/audio/*.flac")}
    for file, samples in manifests.items():
        assert json.loads(file.read_text(encoding="utf-8")) == samples, f"run make_recordings.py: {file.name}"


def test_nothing_that_is_judged_is_ever_trained_on(scripts):
    build = scripts["make_speech"]
    utterances = [
        *build.training_utterances(FOLDER, count=24_000, seed=0),
        *build.other_utterances(FOLDER, variants=build.OTHER_VARIANTS, highest_pitch=95, count=2_000, seed=0),
        *build.copied_utterances(FOLDER, speakers=400, each=8, seed=0),
    ]
    learned = {scripts["speech"].written(one.text) for one in utterances}
    assert len(learned) > 5_000
    judged = {scripts["speech"].written(text) for text, _ in scripts["make_recordings"].judged_sentences()}
    assert len(judged) == 20
    assert not judged & learned
    assert not judged & spoken_texts(json.loads((FOLDER / "new_voice" / "train.json").read_text()))
    assert scripts["speech"].NEW_SPEAKER.variant not in {one.speaker.variant for one in utterances}


def test_the_new_voice_says_every_word(scripts):
    samples = json.loads((FOLDER / "new_voice" / "train.json").read_text())
    assert len(samples) == 40
    words = {word for text in spoken_texts(samples) for word in text.split()}
    vocabulary = [word for kinds in scripts["speech"].WORDS.values() for kind in kinds.values() for word in kind]
    assert words == {scripts["speech"].written(word) for word in vocabulary}


def test_every_word_is_one_token(scripts):
    tokenizer = build_tiny_tokenizer(scripts["make_base"].tokenizer_corpus(), vocab_size=2048)
    assert tokenizer.tokenize("call Maria on Monday") == ["call", "ĠMaria", "Ġon", "ĠMonday"]
    words = [word for words in scripts["speech"].WORDS["ar"].values() for word in words]
    assert {len(tokenizer.tokenize(scripts["speech"].written(word))) for word in words} == {1}


def test_what_is_said_is_heard_across_voices(scripts):
    """On the recordings themselves: without this the judge could not be right about what a model says."""
    hear = scripts["listening"]
    candidates = [hear.words(read(f"judged/audio/high_2_{number:02d}.flac")) for number in range(20)]
    for number in (0, 4, 14):
        assert hear.nearest(hear.words(read(f"judged/audio/low_3_{number:02d}.flac")), candidates) == number


def test_pitch_is_that_of_a_tone_and_of_the_voices(scripts):
    pitch = scripts["listening"].pitch
    time = np.arange(RATE) / RATE
    tone = sum(np.sin(2 * np.pi * 180 * k * time) / k for k in range(1, 6))
    assert 2 ** pitch(tone) == pytest.approx(180, rel=0.01)
    assert np.isnan(pitch(np.random.default_rng(0).normal(size=RATE)))
    heard = [2 ** pitch(read(f"{name}_00.flac")) for name in ("judged/audio/low_3", "judged/audio/high_2")]
    assert heard[0] < 120 < 180 < heard[1] < 240 < 2 ** pitch(read("new_voice/audio/judged_00.flac"))


def test_the_codec_keeps_each_recording_apart(scripts):
    """Five of the forty; the slow test has them all."""
    recordings = [read(f"judged/audio/low_3_{number:02d}.flac") for number in (0, 5, 9, 12, 17)]
    codec = load_codec(FOLDER / "base" / "codec")
    assert scripts["judge"].judge_codec(codec, recordings).good == 5


def test_pitch_and_spectrum_tell_the_voices_apart_through_the_codec(scripts):
    """Two sentences by the new voice and by the one that is nearest to it: the measures know which is which."""
    judge, codec = scripts["judge"], load_codec(FOLDER / "base" / "codec")

    def said(voice: str, number: int):
        waveform = codec.decode(codec.encode([read(f"{voice}_{number:02d}.flac")])[0])
        target = read(f"new_voice/audio/judged_{number:02d}.flac")
        return judge.Said(number=number, speaker="new", waveform=waveform, target=target, ended=True)

    new, other = (
        [said(name, number) for number in (0, 12)] for name in ("new_voice/audio/judged", "judged/audio/high_2")
    )
    assert judge.judge_pitch(new, other) == judge.judge_spectrum(new, other) == judge.Score(2, 2)


def test_an_end_that_comes_too_early_or_too_late_is_none(scripts):
    judge, target = scripts["judge"], np.zeros(RATE, np.float32)

    def said(seconds: float, *, ended: bool = True):
        return judge.Said(number=0, speaker="new", waveform=np.zeros(int(seconds * RATE)), target=target, ended=ended)

    assert judge.judge_ends([said(1.0), said(0.8), said(1.2)]) == judge.Score(3, 3)
    assert judge.judge_ends([said(1.0, ended=False), said(0.5), said(1.6), said(0.0)]) == judge.Score(0, 4)


def test_a_score_counts_what_is_nearer_with_the_adapter(scripts):
    judge = scripts["judge"]
    new, low, high = (
        read(f"{name}_00.flac") for name in ("new_voice/audio/judged", "judged/audio/low_3", "judged/audio/high_2")
    )

    def said(waveform: np.ndarray, number: int = 0):
        return judge.Said(number=number, speaker="new", waveform=waveform, target=new, ended=True)

    assert judge.judge_pitch([said(new), said(low, 1)], [said(high), said(high, 1)]) == judge.Score(1, 2)
    assert judge.judge_spectrum([said(new)], [said(high)]) == judge.Score(1, 1)
    silence = np.zeros(0, np.float32)
    for measure in (judge.judge_pitch, judge.judge_spectrum):
        assert measure([said(new)], [said(silence)]) == judge.Score(1, 1)
        assert measure([said(silence)], [said(low)]) == judge.Score(0, 1)
        base = [said(new), said(high), said(silence)]  # of draws, the median counts: near it once is chance
        assert measure([said(low), said(new), said(new)], base) == judge.Score(1, 1)
        assert measure([said(low), said(silence), said(new)], base) == judge.Score(0, 1)
