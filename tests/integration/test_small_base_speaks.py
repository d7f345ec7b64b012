"""The kept small base says sentences that it was never taught, and ends; tuned, it says them in the new voice."""

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
def test_every_measure_of_the_adapter_that_the_quickstart_trains(judge, tmp_path):
    """By the quickstart's own configuration and launch script, two ranks, to the end."""
    run = tmp_path / "run"
    folders = ["--run.output_dir", str(run), "--data.cache_dir", str(tmp_path / "codes")]
    done = launching.run(
        ["bash", "launch/on_gpus.sh", "2", "-c", str(FOLDER / "new_voice.yaml"), *folders],
        env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": launching.free_port()},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    scores = judge.judge(BASE, run, tmp_path / "said", count=None, draws=3)
    print(scores)
    assert scores["spectrum nearer"] == judge.Score(20, 20)
    assert scores["pitch nearer"].good >= 18, scores
    assert scores["ends"].good >= 56, scores  # of 60
    assert scores["words"].good >= 51, scores  # four trainings: 52 to 59; what is drawn is by chance
