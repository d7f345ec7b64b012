"""Weights in safetensors files: what is written one at a time is what safetensors and transformers read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_higgs.errors import UserError
from ds_higgs.model.weight_files import StoredWeights, write_weights

WEIGHTS = {
    "a": torch.arange(12.0).view(3, 4),
    "b.c": torch.randn(7),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "large": torch.randn(5, 33),
}
SHAPES = {name: tuple(weight.shape) for name, weight in WEIGHTS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("numbers", "files"), [(10**9, 1), (16, 3), (0, 5)])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, numbers: int, files: int):
    transposed = {**WEIGHTS, "a": WEIGHTS["a"].t().contiguous().t()}  # no tensor has to be contiguous
    most = numbers * dtype.itemsize
    write_weights(tmp_path, transposed.items(), shapes=SHAPES, dtype=dtype, stem="trained", max_file_bytes=most)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    by_safetensors = {name: weight for path in paths for name, weight in load_file(path).items()}
    stored = StoredWeights.open(tmp_path, "trained")
    assert stored.shapes == SHAPES
    for name, weight in WEIGHTS.items():
        assert torch.equal(by_safetensors[name], weight.to(dtype)), name
        assert torch.equal(stored.read(name), weight.to(dtype)), name
    assert (tmp_path / "trained.safetensors.index.json").exists() == (files > 1)


def test_bytes_are_those_of_safetensors(tmp_path: Path):
    """Its own writer sorts by size and name, so one tensor is enough to compare."""
    write_weights(tmp_path, [("a", WEIGHTS["a"])], shapes={"a": (3, 4)}, dtype=torch.float32)
    save_file({"a": WEIGHTS["a"]}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_weights_in_another_order_than_announced_are_a_mistake(tmp_path: Path):
    with pytest.raises(AssertionError):
        write_weights(tmp_path, reversed(WEIGHTS.items()), shapes=SHAPES, dtype=torch.float32)


@pytest.mark.parametrize("damage", ["missing", "index", "file"])
def test_damage_is_told_with_the_files_name(tmp_path: Path, damage: str):
    write_weights(tmp_path, WEIGHTS.items(), shapes=SHAPES, dtype=torch.float32, max_file_bytes=64)
    index = tmp_path / "model.safetensors.index.json"
    named = index
    if damage == "missing":
        named = tmp_path / json.loads(index.read_text())["weight_map"]["a"]
        named.unlink()
    elif damage == "index":
        index.write_text("{}")
    else:
        named = next(tmp_path.glob("*.safetensors"))
        named.write_bytes(named.read_bytes()[:-1])
    with pytest.raises(UserError, match=named.name):
        StoredWeights.open(tmp_path)
