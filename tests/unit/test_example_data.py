"""The kept example set is what its script writes, and is fit to train and validate on."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import soundfile

EXAMPLE = Path(__file__).parents[2] / "examples" / "voice_cloning"


def read_manifest(name: str) -> list[dict]:
    return json.loads((EXAMPLE / name).read_text(encoding="utf-8"))


def audio_urls(samples: list[dict]) -> set[str]:
    contents = (item for sample in samples for message in sample["messages"] for item in message["content"])
    return {item["audio_url"] for item in contents if isinstance(item, dict) and item["type"] == "audio"}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_audio", EXAMPLE / "make_audio.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_manifests_are_those_of_the_script(maker):
    for name, samples in maker.build_manifests().items():
        assert read_manifest(name) == samples, f"run make_audio.py: {name} is not what it writes"


def test_no_utterance_is_both_trained_on_and_validated_with():
    assert not audio_urls(read_manifest("train.json")) & audio_urls(read_manifest("val.json"))


def test_every_audio_file_is_used_and_every_used_file_is_there():
    used = audio_urls(read_manifest("train.json")) | audio_urls(read_manifest("val.json"))
    assert used == {f"audio/{path.name}" for path in (EXAMPLE / "audio").iterdir()}


def test_a_reference_is_another_utterance_of_the_same_speaker():
    for sample in read_manifest("train.json") + read_manifest("val.json"):
        _, user, assistant = sample["messages"]
        reference, target = user["content"][1]["audio_url"], assistant["content"][1]["audio_url"]
        assert reference != target
        assert all(url.startswith(f"audio/{sample['speaker']}_") for url in (reference, target))


def test_the_set_is_small_and_in_one_format():
    infos = [soundfile.info(path) for path in sorted((EXAMPLE / "audio").iterdir())]
    assert {(info.format, info.samplerate, info.channels) for info in infos} == {("FLAC", 24_000, 1)}
    assert all(1.5 <= info.duration <= 4 for info in infos)
    assert len({sample["speaker"] for sample in read_manifest("train.json")}) >= 4
    assert sum(path.stat().st_size for path in (EXAMPLE / "audio").iterdir()) < 3_000_000
