"""The short form of the fault harness: each kind of blow once, on the real launcher with two ranks.

The long form is `python -m tests.faults.long_form --report REPORT.md`.
"""

import os
import random
import re
import signal

import pytest

from ds_higgs.checkpoint import find_checkpoint
from tests.faults import scenarios
from tests.faults.job import Job, read_metrics, write_config
from tests.support import launching

pytestmark = pytest.mark.xdist_group("faults")  # they share the undisturbed run


def test_killed_stopped_and_broken_runs_end_as_if_nothing_had_happened(faults_folder, tiny_base, undisturbed):
    chance = random.Random(0)
    config = write_config(faults_folder / "hit", tiny_base, run={"max_steps": 10})
    scenarios.kill_everything(config, ["save"], chance)
    scenarios.send_signals(config, [(signal.SIGUSR1, "deepspeed")], chance)
    scenarios.raise_in_one_rank(config, [(1, 2, "raise")])
    scenarios.same(scenarios.run_to_the_end(config), undisturbed)
    run_dir = config.parent / "run"
    assert len(scenarios.damage_the_newest(run_dir)) == 3 * len(list(find_checkpoint(run_dir, resume="auto").iterdir()))


def test_a_damaged_path_is_the_users_mistake(faults_folder, tiny_base, undisturbed):
    run_dir = faults_folder / "undisturbed" / "run"
    newest = find_checkpoint(run_dir, resume="auto")
    shard = sorted(newest.glob("*optim_states.pt"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    try:
        config = write_config(faults_folder / "path", tiny_base)
        done = launching.run(launching.ds_higgs("train", "-c", config, "--checkpoint.resume", newest))
    finally:
        shard.write_bytes(content)
    assert done.returncode == 2, done.stdout
    assert shard.name in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="file size limits")
def test_a_save_that_fails_leaves_the_old_checkpoints_whole(faults_folder, tiny_base):
    """A file size limit stands for the full disk: the shards are over it, everything else is under it."""
    config = write_config(
        faults_folder / "full", tiny_base, run={"max_steps": 6}, checkpoint={"save_steps": 2, "on_save_error": "warn"}
    )
    scenarios.send_signals(config, [(signal.SIGTERM, "rank")], random.Random(1))
    run_dir = config.parent / "run"
    whole = scenarios.check_all_whole(run_dir)
    job = Job(config, file_size_limit_kib=250)
    assert job.finish() not in (0, 2), "the last save failed, and the job ended as if it had not"
    assert re.search(r"could not save step-\d+: rank \d: .*optim_states.pt: File too large", job.output), job.output
    assert scenarios.check_all_whole(run_dir) == whole
    if max(whole) < 4:
        assert "save_error" in [line["event"] for line in read_metrics(run_dir)]
