"""What commands say and where: the answer on standard output, and no traceback where they are run in odd ways."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ds_higgs.cli.keys import is_read
from ds_higgs.config.file import known_keys
from tests.support import launching
from tests.support.fork_server import run_forked
from tests.support.launching import ROOT, free_environment

APART = ROOT / "tests" / "support" / "apart.py"


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


@pytest.fixture
def say(tmp_path):
    """Run the command line; what it said on each stream, and no traceback in either."""

    def run(*arguments: str | Path, out: str = "out", cwd: Path = ROOT, env: dict[str, str] | None = None) -> Said:
        files = [tmp_path / "out", tmp_path / "err"]
        for file in files:
            file.unlink(missing_ok=True)
        target = str(files[0]) if out == "out" else out
        words = [str(word) for word in (APART, target, files[1], *arguments)]
        environment = free_environment()
        [status], _ = run_forked([(words, environment | (env or {}))], cwd=cwd, environment=environment)
        told, logged = (file.read_text() if file.exists() else "" for file in files)
        assert "Traceback" not in told + logged, logged
        # What takes long says so, and on a busy machine anything may.
        own = [line for line in logged.splitlines(keepends=True) if not line.endswith(" ...\n")]
        return Said(status, told, "".join(own))

    return run


def test_standard_output_is_the_answer_alone(say, example_flags, tiny_base):
    for command in ("validate", "doctor"):
        said = say(command, "--json", *example_flags)
        assert json.loads(said.out)["ok"] is True, said
        assert said.err == "", command
    assert json.loads(say("zero-config", *example_flags).out)["zero_optimization"]["stage"] == 2
    assert say("estimate", *example_flags).out.startswith(f"{tiny_base}: ")
    wrong = say("validate", "--json", *example_flags, "--train_manifest=/nowhere.json")
    assert (wrong.status, json.loads(wrong.out)["ok"]) == (2, False)
    assert wrong.err == "ds-higgs: 1 problem would stop training\n"


def test_libraries_are_heard_where_it_is_asked_for(example_flags):
    """In a new interpreter: DeepSpeed says on standard output, as it is imported, that there is no GPU."""
    command = [*launching.ds_higgs("doctor", "--json", "--verbose"), *example_flags]
    done = subprocess.run(command, env=free_environment(), capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["ok"] is True
    assert "Setting accelerator to" in done.stderr


def test_what_libraries_and_children_print_goes_to_standard_error():
    program = """
import logging, os, subprocess, sys
from ds_higgs.job.answers import keep_for_answers, print_answer
from ds_higgs.job.logs import set_up_logging
keep_for_answers(), keep_for_answers(), set_up_logging()
print("python"), os.write(1, b"C++\\n"), subprocess.run(["echo", "child"])
deepspeed = logging.getLogger("DeepSpeed")
deepspeed.warning("Setting accelerator to CPU. If you"), deepspeed.warning("a real warning")
print_answer("the answer", "\\udcff")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=free_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "the answer \\udcff\n"
    assert {"python", "C++", "child"} <= set(done.stderr.splitlines())
    assert "a real warning" in done.stderr
    assert "Setting accelerator" not in done.stderr


@pytest.mark.parametrize("command", ["train --help", "estimate", "validate", "inspect", "zero-config"])
def test_a_reader_that_leaves_is_no_failure(say, example_flags, tmp_path, command):
    """`ds-higgs COMMAND | head -0`, with standard error in a file and in a pipe that is gone too."""
    words = command.split()
    extra = ["-o", tmp_path / "inspect.html"] if words == ["inspect"] else []
    said = say(*words, *([] if "--help" in words else example_flags), *extra, out="gone")
    assert (said.status, said.err) == (0, "")


def test_narrow_and_without_colours_and_elsewhere(say, example_flags, tmp_path):
    narrow = {"COLUMNS": "60", "NO_COLOR": "1", "TERM": "xterm-256color"}
    for words in (
        ["--help"],
        ["train", "--help"],
        ["manifest", "--help"],
        ["doctor", *example_flags],
        ["validate", *example_flags],
    ):
        said = say(*words, cwd=tmp_path, env=narrow)
        assert (said.status, "\x1b" in said.out) == (0, False), words
        if "--help" in words:
            assert max(map(len, said.out.splitlines())) <= 60, words


@pytest.mark.parametrize(
    "words",
    [
        ["init-tiny", "base"],
        ["manifest", "EXAMPLE", "-o", "train.json"],
        ["init", "EXAMPLE/train.json", "-o", "config.yaml"],
        ["inspect", "FLAGS"],
        ["prepare", "FLAGS", "--data.cache_dir=cache"],
        ["train", "FLAGS", "--run.output_dir=run"],
        ["zero-config", "FLAGS", "-o", "ds.json"],
        ["download", "--out", "base"],
        ["generate", "--base", "BASE", "--text", "a", "-o", "a.wav"],
    ],
)
def test_a_place_that_cannot_be_written_is_told(say, example_flags, tiny_base, example_dir, words):
    """In /proc/sys not even root makes a file."""
    given: list[str] = []
    for word in words:
        word = word.replace("EXAMPLE", str(example_dir)).replace("BASE", str(tiny_base))
        given += example_flags if word == "FLAGS" else [word]
    said = say(*given, cwd=Path("/proc/sys"), env={"HOME": "/proc/none"})
    assert said.status == 2
    assert said.err.startswith("ds-higgs: "), said.err
    assert "cannot be written" in said.err


def test_nowhere_to_write_hinders_no_question(say, example_flags):
    for command in ("validate", "estimate", "doctor"):
        assert say(command, *example_flags, cwd=Path("/proc/sys"), env={"HOME": "/proc/none"}).status == 0


def test_help_shows_the_keys_that_are_read(say):
    shown = say("prepare", "--help").out
    assert "--data.max_audio_s" in shown
    assert "error | skip; default error" in shown
    assert "--optim.learning_rate" not in shown
    everything = say("train", "--help").out
    assert all(f"  --{name}" in everything for name, _, _ in known_keys())
    assert "  --eval.best_by\n" in everything
    assert not is_read("estimate", "checkpoint.save_steps")
