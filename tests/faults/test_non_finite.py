"""A loss that is not a number on one rank: written down by all, then the run stops or leaves the update out."""

import json
import math

import pytest

from tests.faults.job import Job, read_metrics, write_config


def run(folder, base, policy):
    config = write_config(folder, base, run={"max_steps": 4, "on_nonfinite": policy}, checkpoint={"save_steps": 100})
    job = Job(config, module="tests.faults.faulty_train", env={"FAULT": "1:2:nan"})
    return job.finish(), job


def check_record(run_dir):
    records = [json.loads(path.read_text()) for path in sorted(run_dir.glob("nonfinite-step-00000002-rank-*.json"))]
    assert [record["rank"] for record in records] == [0, 1]
    assert all(record["loss"] == "nan" for record in records)
    samples = [sample for record in records for batch in record["samples"] for sample in batch]
    assert len(set(samples)) == 4, samples
    assert all("train.json" in sample for sample in samples)


def test_stop(tmp_path, tiny_base):
    status, job = run(tmp_path / "run", tiny_base, "stop")
    assert status == 1, job.output
    assert "NonFiniteError: loss nan" in job.output
    assert [line["step"] for line in read_metrics(job.run_dir) if line["event"] == "step"] == [1]
    check_record(job.run_dir)


@pytest.mark.slow
def test_skip(tmp_path, tiny_base):
    status, job = run(tmp_path / "run", tiny_base, "skip")
    assert status == 0, job.output
    steps = [line for line in read_metrics(job.run_dir) if line["event"] == "step"]
    assert [line["applied"] for line in steps] == [True, False, True, True]
    assert [line["skipped_steps"] for line in steps] == [0, 1, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in steps if line["applied"])
    check_record(job.run_dir)
