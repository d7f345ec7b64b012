"""A loss that is not a number on one rank: written down by all, then the run stops or leaves the update out."""

import json
import math

import pytest

from tests.faults.job import read_metrics, write_config
from tests.support import launching


def run(folder, base, policy):
    config = write_config(folder, base, run={"max_steps": 4, "on_nonfinite": policy}, checkpoint={"save_steps": 100})
    arguments = ["train", "-c", config]
    done = launching.run_ranks(2, "-m", "tests.faults.faulty_train", *arguments, env={"FAULT": "1:2:nan"})
    return done, folder / "run"


def check_record(run_dir):
    records = [json.loads(path.read_text()) for path in sorted(run_dir.glob("nonfinite-step-00000002-rank-*.json"))]
    assert [record["rank"] for record in records] == [0, 1]
    assert all(record["loss"] == "nan" for record in records)
    samples = [sample for record in records for batch in record["samples"] for sample in batch]
    assert len(set(samples)) == 4, samples
    assert all("train.json" in sample for sample in samples)


def test_stop(tmp_path, tiny_base):
    done, run_dir = run(tmp_path, tiny_base, "stop")
    assert done.returncode == 1, done.stdout
    assert "NonFiniteError: loss nan" in done.stdout
    assert [line["step"] for line in read_metrics(run_dir) if line["event"] == "step"] == [1]
    check_record(run_dir)


@pytest.mark.slow
def test_skip(tmp_path, tiny_base):
    done, run_dir = run(tmp_path, tiny_base, "skip")
    assert done.returncode == 0, done.stdout
    steps = [line for line in read_metrics(run_dir) if line["event"] == "step"]
    assert [line["applied"] for line in steps] == [True, False, True, True]
    assert [line["skipped_steps"] for line in steps] == [0, 1, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in steps if line["applied"])
    check_record(run_dir)
