"""What the data tests share: the tiny base checkpoint's tokenizer, config and codec, and a small set of audio."""

import json
from pathlib import Path

import pytest

from ds_higgs.data.build import build_dataset
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.rules import build_rules
from ds_higgs.model.loading import load_tokenizer, read_model_config

from .audio_files import cloning_sample, text_sample, write_tone


@pytest.fixture(scope="session")
def codec_source(tiny_base):
    return find_codec(None, tiny_base)


@pytest.fixture(scope="session")
def model_config(tiny_base):
    return read_model_config(tiny_base)


@pytest.fixture(scope="session")
def make_rules(tiny_base, codec_source, model_config):
    """The tiny base checkpoint's rules; keyword arguments as in build_rules."""
    tokenizer = load_tokenizer(tiny_base)

    def make(**changes):
        settings = {"tokenizer": tokenizer, "model_config": model_config, "codec": codec_source}
        return build_rules(**{**settings, **changes})

    return make


def write_mixed_manifest(folder: Path, *, num_cloning: int = 7) -> Path:
    """Cloning samples of unequal length with two shared references; one of text; one with a masked reference turn."""
    for index in range(num_cloning):
        write_tone(folder / f"target{index}.flac", 0.3 + 0.17 * index, pitch=150 + 20 * index, seed=index)
    for index in range(2):
        write_tone(folder / f"reference{index}.wav", 0.5, pitch=300 + 50 * index, seed=100 + index)
    samples = [
        cloning_sample(f"reference{index % 2}.wav", f"target{index}.flac", text="word " * (index + 1))
        for index in range(num_cloning)
    ]
    samples.append(text_sample())
    turn = {"role": "assistant", "content": [{"type": "audio", "audio_url": "reference0.wav"}]}
    masked = cloning_sample("reference1.wav", "target0.flac", start_index=2)
    samples.append({**masked, "messages": [{"role": "user", "content": "Read."}, turn, *masked["messages"][1:]]})
    manifest = folder / "train.json"
    manifest.write_text(json.dumps(samples))
    return manifest


@pytest.fixture(scope="session")
def mixed_manifest(tmp_path_factory):
    return write_mixed_manifest(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="session")
def mixed_dataset(mixed_manifest, make_rules, tmp_path_factory):
    return build_dataset(mixed_manifest, rules=make_rules(), cache_dir=tmp_path_factory.mktemp("cache"))
