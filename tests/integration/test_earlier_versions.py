"""What an earlier version left is resumed, exported and reported by this one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ds_higgs.checkpoint.marker import MARKER_NAME, encode_marker, read_marker
from ds_higgs.cli import main
from tests.support import launching

RUN = launching.ROOT / "tests" / "assets" / "run_of_version_0.1.0" / "run"
SAVED_STEP, LAST_STEP = 2, 6


@pytest.fixture(scope="module")
def resumed(tiny_base: Path, example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kept run, moved here with its base and data, and trained to its end."""
    work = tmp_path_factory.mktemp("earlier")
    run = work / "run"
    shutil.copytree(RUN, run)
    (work / "base").symlink_to(tiny_base)
    (work / "data").symlink_to(example_dir)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("WORK", str(work)))
    # Resuming compares the base's path, and the folder was another one then.
    checkpoint = run / "checkpoints" / f"step-{SAVED_STEP:08d}"
    marker = read_marker(checkpoint)
    moved = replace(marker, fixed={**marker.fixed, "model.base": str(work / "base")})
    (checkpoint / MARKER_NAME).write_bytes(encode_marker(moved))
    # Each projection drew its own dropout then; where several share one, as by default now, other numbers are drawn.
    done = launching.run_ds_higgs("train", "-c", config, "--memory.grouped_lora", "false")
    assert done.returncode == 0, done.stdout
    assert f"going on from {checkpoint}" in done.stdout
    return run


def read_steps(run: Path) -> dict[int, dict]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {event["step"]: event for event in events if event["event"] == "step"}


def test_it_goes_on_as_it_would_have(resumed: Path):
    expected, found = read_steps(RUN), read_steps(resumed)
    assert list(found) == list(range(1, LAST_STEP + 1))
    for step in range(SAVED_STEP + 1, LAST_STEP + 1):
        assert found[step]["num_audio_targets"] == expected[step]["num_audio_targets"]
        assert found[step]["learning_rate"] == expected[step]["learning_rate"]
        # fp32 on another CPU: other orders of summation, and AdamW's first steps enlarge them
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=2e-5)
        assert found[step]["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3)


def test_it_is_exported_and_reported(resumed: Path, tmp_path: Path):
    assert main(["export", str(resumed), "--out", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert main(["report", str(resumed), "--out", str(tmp_path / "report.html")]) == 0
    assert "<html" in (tmp_path / "report.html").read_text()
