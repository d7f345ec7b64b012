"""The commands of the README and of the launch scripts, run as they stand there (on the example, for a few steps)."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from ds_higgs.cli.main import build_parser, parse_overrides
from tests.support import launching
from tests.support.launching import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "examples" / "voice_cloning"


def shell_commands() -> list[str]:
    """Every command of the README's plain code blocks, its lines joined."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", README, flags=re.MULTILINE | re.DOTALL)
    joined = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if re.match(r" *(bash|deepspeed|ds-higgs|torchrun)", line)]


def command_starting(start: str) -> list[str]:
    [found] = [command for command in shell_commands() if command.startswith(start)]
    return shlex.split(found)


@pytest.fixture
def on_the_example(tiny_base, tmp_path):
    """Put the example, the tiny base and a temporary folder in the place of the README's names."""
    values = {
        "train.json": EXAMPLE / "train.json",
        "val.json": EXAMPLE / "val.json",
        "out": tmp_path / "out",
        "BASE": tiny_base,
        "bosonai/higgs-audio-v2-generation-3B-base": tiny_base,
    }

    def build(command: list[str]) -> list[str]:
        return [str(values.get(word, word)) for word in command]

    return build


@pytest.mark.slow
def test_training_on_one_gpu(on_the_example, tmp_path):
    command = on_the_example(command_starting("bash launch/train_1gpu.sh"))
    done = launching.run([*command, "--run.max_steps", "1"], env={"MASTER_PORT": launching.free_port()})
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "out" / "adapters" / "final" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_training_on_8_gpus_with_two(on_the_example, tmp_path):
    command = on_the_example(command_starting("deepspeed --num_gpus 8"))
    command[command.index("8")] = "2"
    command[1:1] = ["--master_port", launching.free_port()]
    done = launching.run([*command, "--run.max_steps", "1"])
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "out" / "adapters" / "final" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_quickstart_from_a_clean_copy_and_again(tmp_path, times):
    """In the environment of this test run, with fewer steps and shorter speech."""
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__", "*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=left_out)
    environment = Path(sys.prefix)
    if not (environment / ".installed").exists():
        pytest.skip("needs the environment that launch/test.sh makes")
    for _ in range(times):
        done = launching.run(
            ["bash", "launch/quickstart.sh", "--run.max_steps", "4", "--eval.max_audio_s", "1"],
            env={"VENV": str(environment), "MASTER_PORT": launching.free_port()},
            cwd=copy,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert "validation audio loss" in done.stdout
        assert len(done.stdout.splitlines()) < 60, done.stdout
        assert not re.search(r"warn|\[INFO\]|traceback|deprecat", done.stdout, flags=re.IGNORECASE), done.stdout
    for made in ("new_voice/metrics.jsonl", "new_voice/report.html", "new_voice_adapter/adapter_config.json"):
        assert (copy / "outputs" / made).exists()


def test_every_command_that_is_named_exists():
    known = set(build_parser()._subparsers._group_actions[0].choices)  # argparse has no public way
    named = set(re.findall(r"`?ds-higgs ([a-z-]+)", README))
    assert named <= known
    assert {"train", "validate", "prepare", "export", "generate", "report", "doctor", "manifest"} - known == set()


def test_every_flag_that_is_typed_is_known():
    for command in shell_commands():
        words = shlex.split(command)
        if "train" in words or words[:1] == ["bash"]:
            flags = words[next((i for i, word in enumerate(words) if word.startswith("--train")), len(words)) :]
            assert parse_overrides(flags) or not flags, command


def test_scripts_and_pages_that_are_named_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(launch/[\w.]+)", README):
        assert (ROOT / path).exists(), path
