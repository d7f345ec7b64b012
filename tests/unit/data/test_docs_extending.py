"""docs/extending.md: its toy codec and toy source work when added as the page says."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ds_higgs.commands.manifest import make_manifests
from ds_higgs.data.build import build_dataset
from ds_higgs.data.codec import opening as codecs
from ds_higgs.data.sources import opening as sources
from tests.support.launching import ROOT

from .audio_files import write_tone

PAGE = ROOT / "docs" / "extending.md"


def load_block(number: int, tmp_path: Path) -> ModuleType:
    """The page's Python block of that number, as a module in a file of its own."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[number]
    path = tmp_path / f"block_{number}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_toy_codec_makes_a_data_set(tmp_path, monkeypatch, make_rules, example_dir):
    toy = load_block(0, tmp_path)
    monkeypatch.setattr(codecs, "KINDS", (*codecs.KINDS, toy.KIND))
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "sampling_rate": 24000}))
    save_file({"nothing": torch.zeros(1)}, folder / "toy.safetensors")
    source = codecs.find_codec(str(folder))
    dataset = build_dataset(example_dir / "val.json", rules=make_rules(codec=source), cache_dir=tmp_path / "codes")
    codes = dataset[0].get_audio_codes(1)
    assert codes.shape[0] == 8
    assert codes.float().std() > 0
    codec = source.load()
    again = codec.encode([codec.decode(codes)])[0]
    assert torch.equal(again, codes)
    assert codec.decode(codes).dtype == np.float32


def test_the_toy_form_makes_a_manifest(tmp_path, monkeypatch):
    toy = load_block(1, tmp_path)
    monkeypatch.setattr(sources, "FORMS", (*sources.FORMS, toy.FORM))
    for name in ("a.wav", "b.wav"):
        write_tone(tmp_path / name)
    (tmp_path / "anna.arrows").write_text("a.wav => one\nb.wav => two\n")
    (made,) = make_manifests(tmp_path / "anna.arrows", tmp_path / "train.json")
    assert (made.num_samples, made.num_speakers, made.num_without_reference) == (2, 1, 0)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:ds_higgs|tests)/[\w/.]+)`", PAGE.read_text("utf-8")))))
def test_the_files_that_it_names_exist(path):
    assert (ROOT / path).exists()
