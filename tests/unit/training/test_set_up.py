"""What makes a run impossible is found before its model is read."""

import json
import os

import pytest
import torch

from ds_higgs.config.file import load_config
from ds_higgs.errors import UserError
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.preflight import TRACKER_PACKAGES
from ds_higgs.job.stopping import StopRequests
from ds_higgs.model.tiny import write_tiny_base
from ds_higgs.training import engine
from ds_higgs.training.set_up import choose_algorithms, set_up


def test_deterministic_runs_have_cublas_workspace(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_algorithms(deterministic=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        choose_algorithms(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        choose_algorithms(deterministic=False)


@pytest.fixture
def values(tiny_base, example_dir, tmp_path, monkeypatch):
    """A configuration's values; reading the weights fails the test."""

    def load_model(*arguments, **options):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(engine, "load_model", load_model)
    monkeypatch.setitem(TRACKER_PACKAGES, "wandb", "absent_package")
    (tmp_path / "train.json").write_text(json.dumps(json.loads((example_dir / "val.json").read_text())[:1]))
    (tmp_path / "file").touch()
    return {
        "run.output_dir": str(tmp_path / "run"),
        "model.base": str(tiny_base),
        "data.train_manifest": str(tmp_path / "train.json"),
        "data.audio_root": str(example_dir),
        "data.cache_dir": str(tmp_path / "cache"),
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("logging.wandb", "project", "wandb: the package absent_package is not installed"),
        ("loss.codebook_weights", [1] * 7, "loss.codebook_weights: found 7, the base checkpoint has 8 codebooks"),
        ("run.output_dir", "file", "run.output_dir: found the file .*file"),
        ("run.output_dir", "/proc/run", "run.output_dir: /proc/run cannot be written"),
        ("data.cache_dir", "file/codes", "data.cache_dir: found the file .*file"),
        ("zero.extra", {"zero_optimization": None}, "zero.extra.zero_optimization: found None"),
    ],
)
def test_found_before_the_model_is_loaded(values, tmp_path, monkeypatch, key, value, message):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {**values, key: value})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        set_up(config, Ranks(0, 1, 0), StopRequests(lambda: False))
    assert sorted(tmp_path.iterdir()) == before


def test_the_model_is_loaded_where_nothing_is_wrong(values, caplog):
    for weight in (1, 0):
        caplog.clear()
        with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
            set_up(load_config(None, values | {"loss.eos_weight": weight}), Ranks(0, 1, 0), StopRequests(lambda: False))
        assert ("the end of speech is not learned" in caplog.text) == (weight == 0)


def test_a_warm_start_from_nothing(values):
    config = load_config(None, values | {"train.mode": "full", "train.from": "absent"})
    with pytest.raises(UserError, match=r"train\.from: absent does not exist; expected a run, a checkpoint"):
        set_up(config, Ranks(0, 1, 0), StopRequests(lambda: False))
    with pytest.raises(UserError, match=r"train\.from.*: is for train\.mode audio_path and full; .* export PATH"):
        load_config(None, values | {"train.from": "absent"})


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_ranks_may_not_wait_for_one_without_whisper_features(values, tmp_path, mode):
    """Where a micro-batch has no reference audio, ZeRO-3's gathering of the Whisper tower would hang."""
    write_tiny_base(tmp_path / "base", whisper=True)
    config = load_config(None, values | {"model.base": str(tmp_path / "base"), "train.mode": mode, "zero.stage": 3})
    with pytest.raises(UserError, match=r"zero\.stage: 3 cannot train .* Whisper on several GPUs"):
        set_up(config, Ranks(0, 2, 0), StopRequests(lambda: False))
