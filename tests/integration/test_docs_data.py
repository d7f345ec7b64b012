"""Every command of docs/data.md, run in its order on a small set of recordings."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml

from ds_higgs.cli.main import run
from ds_higgs.data.chatml import parse_sample
from tests.support.patience import HANG_S

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, example_dir, tiny_base, monkeypatch):
    """recordings/ of two speakers, and config.yaml, as the page has them."""
    for path in sorted((example_dir / "audio").glob("speaker_00[12]_0[0-3].flac")):
        speaker = path.stem[:11]
        (tmp_path / "recordings" / speaker).mkdir(parents=True, exist_ok=True)
        samples, rate = soundfile.read(path)
        soundfile.write(tmp_path / "recordings" / speaker / f"{path.stem}.wav", samples, rate)
        (tmp_path / "recordings" / speaker / f"{path.stem}.txt").write_text(f"Text of {path.stem}.")
    config = {
        "run": {"output_dir": "run"},
        "model": {"base": str(tiny_base)},
        "data": {"train_manifest": "data/train.json", "val_manifest": "data/train-val.json", "cache_dir": "cache"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("workplace")
def test_the_commands_run_in_their_order(capsys):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 6
    for line in lines:
        command, *arguments = shlex.split(line)
        if command == "ds-higgs":
            run(arguments)
            continue
        assert command == "deepspeed"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29271", "-m"]
        module = arguments[arguments.index("--module") + 1 :]
        environment = os.environ | {"PYTHONPATH": str(PAGE.parents[1])}
        subprocess.run(launcher + module, check=True, capture_output=True, timeout=HANG_S, env=environment)
    output = capsys.readouterr().out
    assert "data/train.json: 4 samples of 2 speakers" in output
    assert "4 encoded now, 0 in the cache already" in output
    assert "0 encoded now, 4 in the cache already" in output


def test_the_sample_of_the_page_is_valid():
    (block,) = blocks("json")
    assert parse_sample(json.loads(block)).speaker == "speaker_001"
