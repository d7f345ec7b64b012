"""The kept small base says what it is asked for and ends; tuned to a new voice, it speaks in that voice."""

import importlib
import sys
from types import ModuleType

import pytest

from tests.support import launching
from tests.support.launching import ROOT

FOLDER = ROOT / "examples" / "small_base"
BASE = FOLDER / "base"


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("judge")
    finally:
        sys.path.pop(0)


def test_the_base_says_sentences_that_it_was_never_taught(judge, tmp_path):
    said = judge.speak(judge.load(BASE, None, tmp_path / "codes"), judge.JUDGED, tmp_path / "said", count=3)
    assert judge.judge_words(said) == judge.judge_ends(said) == judge.Score(3, 3)


@pytest.mark.slow
def test_every_measure_of_the_base(judge, tmp_path):
    scores = judge.judge(BASE, None, tmp_path, count=None)
    print(scores)
    assert scores["codec"] == judge.Score(40, 40)
    assert scores["words"].good >= 36, scores
    assert scores["ends"].good >= 38, scores


@pytest.mark.slow
def test_a_run_on_the_new_voice_brings_the_base_nearer_to_it(judge, tmp_path):
    """The quickstart's own training, by two processes."""
    run = tmp_path / "run"
    options = {"run.output_dir": run, "data.cache_dir": tmp_path / "codes", "eval.num_audio_samples": 0}
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    done = launching.run_ranks(2, "-m", "ds_higgs", "train", "-c", FOLDER / "new_voice.yaml", *flags)
    assert done.returncode == 0, done.stdout[-4000:]
    scores = judge.judge(BASE, run, tmp_path, count=None)
    print(scores)
    assert scores["pitch nearer"].good == scores["spectrum nearer"].good == 20, scores
    assert scores["words"].good >= 18, scores
    assert scores["ends"].good >= 19, scores
