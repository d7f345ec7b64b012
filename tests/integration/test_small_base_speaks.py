"""The kept small base says what it is asked for, in sentences that it was never taught, and ends."""

import importlib
import sys
from types import ModuleType

import pytest

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
