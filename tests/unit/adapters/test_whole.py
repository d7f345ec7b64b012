"""Weights that a run trained whole: opened, put on their base, scaled, and exported as a whole model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_higgs.adapters.applying import put_on
from ds_higgs.adapters.opening import open_adapter
from ds_higgs.adapters.whole_model import write_whole_model
from ds_higgs.commands.export import export
from ds_higgs.errors import UserError
from ds_higgs.model.loading import load_model
from ds_higgs.model.tiny import write_tiny_base
from tests.support.runs import write_whole_weights


@pytest.fixture(scope="module")
def weights(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an audio_path run; read only."""
    folder = tmp_path_factory.mktemp("whole") / "weights"
    write_whole_weights(tiny_base, folder)
    return folder


def state_on(base: Path, weights: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    with open_adapter(weights) as adapter:
        return put_on(load_model(base, dtype=torch.float32), adapter, scale=scale).state_dict()


def test_trained_weights_take_the_place_of_the_bases(tiny_base: Path, weights: Path):
    base, trained = load_model(tiny_base, dtype=torch.float32).state_dict(), load_file(weights / "trained.safetensors")
    on_base = state_on(tiny_base, weights)
    assert on_base.keys() == base.keys()
    for name, weight in on_base.items():
        assert torch.equal(weight, trained.get(name, base[name])), name
    half = state_on(tiny_base, weights, scale=0.5)
    for name, weight in trained.items():
        torch.testing.assert_close(half[name], (weight + base[name]) / 2, msg=name)
    assert all(torch.equal(weight, base[name]) for name, weight in state_on(tiny_base, weights, scale=0).items())


def test_weights_of_another_architecture_are_refused(weights: Path, tmp_path: Path):
    write_tiny_base(tmp_path / "base", hidden_size=64, num_layers=1, intermediate_size=96)
    with open_adapter(weights) as adapter, pytest.raises(UserError, match="do not fit the base checkpoint"):
        put_on(load_model(tmp_path / "base", dtype=torch.float32), adapter)
    with open_adapter(weights, base=str(tmp_path / "base")) as adapter, pytest.raises(UserError, match="do not fit"):
        write_whole_model(tmp_path / "base", adapter.whole, tmp_path / "out", dtype=torch.float32, where="it")


def test_a_damaged_description_is_refused(tiny_base: Path, tmp_path: Path):
    write_whole_weights(tiny_base, tmp_path)
    info = tmp_path / "trained_weights.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "mode": "half"}))
    with pytest.raises(UserError, match=r"trained_weights.json: not what ds-higgs wrote there"), open_adapter(tmp_path):
        pass


def test_an_export_is_the_base_with_the_trained_weights(tiny_base: Path, weights: Path, tmp_path: Path):
    export(weights, tmp_path / "model", merge=True, precision="fp32")
    exported = load_model(tmp_path / "model", dtype=torch.float32).state_dict()
    expected = state_on(tiny_base, weights)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], weight) for name, weight in expected.items())
    assert "A model with a fine-tuned audio path for Higgs Audio v2" in (tmp_path / "model" / "README.md").read_text()
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_a_native_export_of_a_native_base_is_the_same_model(tiny_base: Path, weights: Path, tmp_path: Path):
    export(weights, tmp_path / "native", merge=True, precision="fp32", layout="transformers", lora_scale=0.5)
    expected = state_on(tiny_base, weights, scale=0.5)
    exported = load_model(tmp_path / "native", dtype=torch.float32).state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in expected.items())
    export(weights, tmp_path / "again", merge=True, precision="fp32", base=str(tmp_path / "native"))
    trained = load_file(weights / "trained.safetensors")
    again = load_model(tmp_path / "again", dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], trained.get(name, expected[name])) for name in expected)


def test_there_is_no_adapter_to_export(weights: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"train.mode audio_path trained the base's own weights, no adapter: add --merge"
    ):
        export(weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()
