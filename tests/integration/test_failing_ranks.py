"""One rank that fails ends the job within 30 s, its message comes last and is kept."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import launching
from tests.support.patience import patience

WORKER = Path(__file__).with_name("workers") / "failing_rank.py"


def launch(launcher: str, run_dir: Path, fault: str, *, hang: bool) -> tuple[subprocess.CompletedProcess[str], float]:
    """What came of it, and the seconds from the fault on."""
    command = getattr(launching, launcher)(2, WORKER, run_dir)
    done = launching.run(command, env={"DS_HIGGS_FAULT": fault, "DS_HIGGS_HANG": "1" if hang else ""})
    return done, seconds_since_the_blow(run_dir)


def seconds_since_the_blow(run_dir: Path) -> float:
    """Since the rank failed; 0 where none did."""
    blow = run_dir / "blow"
    return time.time() - blow.stat().st_mtime if blow.exists() else 0.0


def launch_on_two_machines(run_dir: Path, fault: str, *, hang: bool) -> list[subprocess.CompletedProcess[str]]:
    """Rank 1 has a process space of its own, where rank 0 cannot see whether it lives: as on another machine."""
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launching.free_port()}
    fault_variables = {"DS_HIGGS_FAULT": fault, "DS_HIGGS_HANG": "1" if hang else ""}
    # The first process of a process space cannot kill itself, so that the rank is its second.
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", '"$0" "$@"; exit $?']

    def launch_rank(rank: int) -> subprocess.CompletedProcess[str]:
        command = [*(elsewhere if rank else []), sys.executable, WORKER, run_dir]
        return launching.run(command, env={**rendezvous, **fault_variables, "RANK": str(rank)})

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(launch_rank, range(2)))


def lines_of_ranks(output: str) -> list[str]:
    """What the ranks said, without the launchers' own lines."""
    said = ("rank ", "FloatingPointError", "ds-higgs")
    return [line for line in output.splitlines() if line.startswith(said)]


LONG_FORM = pytest.mark.slow


@pytest.mark.parametrize(
    ("launcher", "hang"),
    [
        ("deepspeed", True),
        pytest.param("torchrun", False, marks=LONG_FORM),
        pytest.param("deepspeed", False, marks=LONG_FORM),
        pytest.param("torchrun", True, marks=LONG_FORM),
    ],
)
def test_an_exception_ends_all_ranks(tmp_path, launcher, hang):
    done, seconds = launch(launcher, tmp_path, "1:raise", hang=hang)
    assert done.returncode not in (0, 2), done.stdout
    assert seconds < patience(30)
    assert lines_of_ranks(done.stdout)[-1] == "FloatingPointError: the answer is not 42", done.stdout
    kept = (tmp_path / "failure.txt").read_text()
    assert "rank 1: Traceback" in kept
    assert "the answer is not 42" in kept


@pytest.mark.parametrize(
    ("launcher", "faulty"),
    [
        ("deepspeed", 0),
        pytest.param("deepspeed", 1, marks=LONG_FORM),
        pytest.param("torchrun", 0, marks=LONG_FORM),
        pytest.param("torchrun", 1, marks=LONG_FORM),
    ],
)
def test_a_killed_rank_ends_the_others(tmp_path, launcher, faulty):
    done, seconds = launch(launcher, tmp_path, f"{faulty}:kill", hang=True)
    assert done.returncode != 0, done.stdout
    assert seconds < patience(30)
    message = f"rank {faulty} died without a message (its process "
    assert message in lines_of_ranks(done.stdout)[-1], done.stdout
    assert message in (tmp_path / "failure.txt").read_text()


def test_a_users_mistake_on_all_ranks_is_told_once(tmp_path):
    done, _ = launch("deepspeed", tmp_path, "all:user", hang=False)
    assert done.returncode == 2, done.stdout
    assert lines_of_ranks(done.stdout) == ["ds-higgs: train.json:3: no audio"]


def test_a_broken_collective_is_blamed_on_the_rank_that_died(tmp_path):
    done, _ = launch("torchrun", tmp_path, "1:kill", hang=False)
    assert "rank 1 died without a message" in (tmp_path / "failure.txt").read_text(), done.stdout


@LONG_FORM
@pytest.mark.skipif(os.geteuid() != 0, reason="a process space of its own needs root")
@pytest.mark.parametrize("hang", [True, False])
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_rank_lost_with_its_machine_ends_the_others(tmp_path, faulty, hang):
    other = launch_on_two_machines(tmp_path, f"{faulty}:kill", hang=hang)[1 - faulty]
    assert seconds_since_the_blow(tmp_path) < patience(30)
    assert other.returncode == 1, other.stdout
    # rank 0 holds the store by which the others would learn of its end
    expected = "has not answered for 20 s" if faulty == 1 else "lost the connection to the job's store"
    assert expected in (tmp_path / "failure.txt").read_text(), other.stdout


@LONG_FORM
def test_without_a_fault_all_ranks_end_well(tmp_path):
    done, _ = launch("deepspeed", tmp_path, "none:none", hang=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("is through") == 2
    assert not (tmp_path / "failure.txt").exists()


def test_a_rank_that_fails_before_the_process_group_ends_the_others(tmp_path):
    """Without a launcher, which would end them: as on several machines."""
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launching.free_port()}
    command = [sys.executable, WORKER, tmp_path]
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(launching.run, command, env={**rendezvous, "DS_HIGGS_FAULT": "1:early", "RANK": str(rank)})
            for rank in range(2)
        ]
        done = [rank.result() for rank in ranks]
    assert seconds_since_the_blow(tmp_path) < patience(30)
    assert [one.returncode for one in done] == [1, 1], done[0].stdout + done[1].stdout
    assert "rank 0: ended because rank 1 failed: FloatingPointError" in done[0].stdout


@LONG_FORM
def test_a_suspended_rank_is_not_dead(tmp_path):
    done, _ = launch("deepspeed", tmp_path, "1:suspend", hang=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("is through") == 2
