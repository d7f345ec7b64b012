"""The short form of the fault harness: each kind of blow once, on the real launcher with two ranks.

The long form is `python -m tests.faults.long_form --report REPORT.md`.
"""

import os
import random
import re
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ds_higgs.checkpoint import find_checkpoint
from tests.faults import scenarios
from tests.faults.job import Job, read_metrics, tmpfs, write_config
from tests.support import launching


def test_a_killed_and_stopped_run_ends_as_if_nothing_had_happened(tmp_path, tiny_base):
    settings = {"run": {"max_steps": 9}, "eval": {"best_by": "loss"}}
    undisturbed = scenarios.run_in_forks(write_config(tmp_path / "undisturbed", tiny_base, **settings))
    # Its checkpoints and adapters are written in the background, which is to change nothing in them.
    config = write_config(tmp_path / "hit", tiny_base, **settings, checkpoint={"async": True})
    scenarios.kill_everything(config, ["save"], random.Random(0))
    run_dir = config.parent / "run"
    validation_at_8 = 2 if find_checkpoint(run_dir, resume="auto") is None else 1  # a run's first one is at step 0
    assert scenarios.stop_in_a_validation(config, rank=1, number=validation_at_8) == 8
    scenarios.same(scenarios.run_in_forks(config), undisturbed)
    newest = find_checkpoint(run_dir, resume="auto")
    assert newest is not None
    assert len(scenarios.damage_the_newest(run_dir)) == 3 * len(list(newest.iterdir()))
    check_a_damaged_path_is_the_users_mistake(config, newest)


def check_a_damaged_path_is_the_users_mistake(config: Path, checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*optim_states.pt"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    done = launching.run_ds_higgs("train", "-c", config, "--checkpoint.resume", checkpoint)
    assert done.returncode == 2, done.stdout
    assert shard.name in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_second_start_and_a_save_that_fails_leave_the_old_checkpoints_whole(tmp_path, tiny_base):
    """A file size limit stands for the full disk: the shards are over it, everything else is under it."""
    settings = {
        "run": {"max_steps": 100_000, "epochs": 100_000},
        "checkpoint": {"save_steps": 3, "on_save_error": "warn"},
    }
    job = Job(write_config(tmp_path / "full", tiny_base, **settings))
    assert job.wait_until(lambda: bool(steps_of(job.run_dir, "checkpoint")), poll_s=0.02), job.output[-4000:]
    scenarios.start_beside(job)
    for rank in range(job.ranks):
        job.rank(rank).rlimit(psutil.RLIMIT_FSIZE, (250 << 10, 250 << 10))
    assert job.wait_until(lambda: bool(steps_of(job.run_dir, "save_error")), poll_s=0.02), job.output[-4000:]
    job.launcher.send_signal(signal.SIGUSR1)
    assert job.finish() not in (0, 2), "the last save failed, and the job ended as if it had not"
    assert re.search(r"could not save step-\d+: rank \d: .*optim_states.pt: File too large", job.output), job.output
    saved = steps_of(job.run_dir, "checkpoint")
    assert scenarios.check_all_whole(job.run_dir) == saved[:-3:-1]
    assert min(steps_of(job.run_dir, "save_error")) > saved[-1]


def steps_of(run_dir: Path, event: str) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir) if line["event"] == event]


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="a small disk of its own needs root")
def test_a_run_that_may_goes_on_through_a_full_disk(tmp_path, tiny_base):
    """Nothing can be written for some steps, metrics and trackers neither; with room again, nothing of them is lost."""
    settings = {
        "run": {"max_steps": 100_000, "epochs": 100_000},
        "checkpoint": {"save_steps": 2, "on_save_error": "warn"},
        "logging": {"tensorboard": True, "csv": True, "log_steps": 1},
    }
    config = write_config(tmp_path / "full", tiny_base, **settings)
    with tmpfs(config.parent / "run", size_mib=32):
        job = Job(config)
        assert job.wait_for_steps(3), job.output[-4000:]
        fill(job.run_dir / "filler")
        assert job.wait_until(lambda: _has_gone_on_without(job), poll_s=0.1), job.output[-4000:]
        (job.run_dir / "filler").unlink()
        scenarios.stop(job)
        steps = steps_of(job.run_dir, "step")
        assert steps == list(range(1, len(steps) + 1))
        assert scenarios.check_all_whole(job.run_dir)[0] == steps[-1]
        assert "save_error" in {line["event"] for line in read_metrics(job.run_dir)}


def _has_gone_on_without(job: Job) -> bool:
    """Whether metrics, trackers and a save have failed for want of space, and steps were made all the same."""
    told = job.output
    return (
        told.count("going on without it") > 20
        and f"No space left on device: '{job.run_dir / 'metrics.jsonl'}'" in told
        and re.search(r"rank 0: could not save .*adapters/step-\d+: .*No space left", told) is not None
    )


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
