"""Random configurations through the command line's own function: it does its work, or says what is wrong; status 2."""

import json

import pytest

from tests.support.in_process import status_of
from tests.support.wild_configs import wild_arguments


@pytest.fixture
def sound(tiny_base, example_dir, tmp_path, monkeypatch):
    """Settings with which every command ends well; nothing is looked for on the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)  # where wild relative paths lead
    samples = json.loads((example_dir / "val.json").read_text())[:1]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    return {
        "run.output_dir": str(tmp_path / "run"),
        "model.base": str(tiny_base),
        "data.train_manifest": str(tmp_path / "train.json"),
        "data.audio_root": str(example_dir),
        "data.cache_dir": str(tmp_path / "cache"),
    }


def check(seeds, sound, folder):
    statuses = {}
    for seed in seeds:
        arguments = wild_arguments(seed, sound, folder)
        statuses[seed] = status_of(arguments)
    assert {seed: status for seed, status in statuses.items() if status not in (0, 2)} == {}
    shares = [list(statuses.values()).count(status) / len(statuses) for status in (0, 2)]
    assert min(shares) > 0.1, f"sound and wrong: {shares}"


def test_wild_configurations_end_well_or_with_status_2(sound, tmp_path, capsys):
    check(range(80), sound, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(80, 5080, 1000))
def test_5000_wild_configurations(first, sound, tmp_path, capsys):
    check(range(first, first + 1000), sound, tmp_path)
