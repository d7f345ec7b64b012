"""The README's five commands, from a folder of wav + txt to speech: as they are printed, in a fresh clone."""

import json
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import soundfile

from ds_higgs.cli.main import build_parser
from tests.faults.job import Job, write_config
from tests.support.launching import ROOT, free_environment
from tests.support.patience import patience
from tests.support.released_shape import write_released_shape
from tests.unit.data.audio_files import cloning_sample, write_tone

PROMISED_MINUTES = 4
FEW_RECORDINGS = 12  # for the released codec's classes, which take seconds a clip on the CPU


def five_commands() -> list[str]:
    """The block under the README's heading, a command a line."""
    part = (ROOT / "README.md").read_text().partition("## From recordings to a heard voice")[2].partition("\n## ")[0]
    return re.search(r"```\n(.*?)```", part, re.DOTALL).group(1).splitlines()


def write_recordings(folder: Path, example: Path) -> None:
    """The example's targets as 0001.wav, 0001.txt and so on."""
    folder.mkdir()
    samples = [one for name in ("train", "val") for one in json.loads((example / f"{name}.json").read_text())]
    for number, sample in enumerate(samples, start=1):
        text, audio = sample["messages"][-1]["content"]
        waveform, rate = soundfile.read(example / audio["audio_url"])
        soundfile.write(folder / f"{number:04d}.wav", waveform, rate)
        (folder / f"{number:04d}.txt").write_text(text["text"])


@pytest.fixture
def clone(tmp_path, example_dir) -> Path:
    """A fresh clone, used with the environment of this test run."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    write_recordings(tmp_path / "clone" / "recordings", example_dir)
    return tmp_path / "clone"


def run_all(commands: list[str], clone: Path) -> float:
    """Run commands in a shell of a user's; the seconds that they took."""
    started = time.monotonic()
    for command in commands:
        environment = free_environment() | {"PYTHONPATH": str(clone)}
        done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
        assert not re.search(r"warning|traceback|deprecat", done.stderr, re.IGNORECASE), done.stderr[-4000:]
    return time.monotonic() - started


def assert_spoke(clone: Path) -> None:
    waveform, rate = soundfile.read(clone / "hello.wav")
    assert rate == 24_000
    assert len(waveform) > 0
    assert (clone / "job" / "run" / "adapters" / "best" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_five_commands_on_the_tiny_base(clone):
    commands = five_commands()
    assert len(commands) == 5
    assert run_all(commands, clone) < patience(60 * PROMISED_MINUTES)
    assert_spoke(clone)


@pytest.mark.slow
def test_the_same_with_a_base_shaped_like_the_released_one(clone):
    """What doctor and validate have passed, nothing later fails on."""
    (clone / "base").mkdir()
    write_released_shape(clone / "base")
    for file in sorted((clone / "recordings").iterdir())[2 * FEW_RECORDINGS :]:  # wav and txt
        file.unlink()
    first, *rest = five_commands()[1:]
    checks = [f"ds-higgs {check} -c job/config.yaml" for check in ("doctor", "validate")]
    run_all([first, *checks, *rest], clone)
    assert_spoke(clone)


@pytest.mark.slow
def test_a_stop_is_heard_while_the_released_codecs_classes_encode(tmp_path):
    """They take seconds a clip on the CPU, and minutes for all: a stop has to be heard between two."""
    (tmp_path / "base").mkdir()
    write_released_shape(tmp_path / "base")
    for number in range(32):
        write_tone(tmp_path / "data" / f"{number}.wav", 6.0, pitch=100 + 5 * number, seed=number)
    samples = [cloning_sample(f"{number}.wav", f"{(number + 1) % 32}.wav") for number in range(32)]
    (tmp_path / "data" / "train.json").write_text(json.dumps(samples))
    data = {"train_manifest": str(tmp_path / "data" / "train.json"), "val_manifest": None}
    job = Job(write_config(tmp_path / "job", tmp_path / "base", data=data))
    assert job.wait_until(lambda: "encoding 32 clips" in job.output, poll_s=0.5)
    job.rank(0).send_signal(signal.SIGTERM)
    assert job.finish() == 0, job.output[-4000:]
    assert "stopped (SIGTERM); to go on: " in job.output
    assert not job.run_dir.exists()


def test_the_parser_takes_every_command():
    for command in five_commands():
        program, *arguments = shlex.split(command)
        assert program == "ds-higgs"
        _, rest = build_parser().parse_known_args(arguments)
        assert rest == []
