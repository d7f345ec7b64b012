"""The Slurm script with stand-ins for Slurm: warned before its limit, the job saves and queues itself again."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.job import last_step, write_config
from tests.faults.scenarios import check_all_whole
from tests.support import launching
from tests.support.patience import HANG_S

SCONTROL = '#!/bin/sh\n[ "$1" = requeue ] && echo "requeued $2" || echo 127.0.0.1\n'
DS_HIGGS = '#!/bin/sh\nexec python -m ds_higgs "$@"\n'
SRUN = """#!/usr/bin/env python
import os, signal, subprocess, sys
def start(task):
    names = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_NTASKS": "2"}
    return subprocess.Popen(sys.argv[1:], env={**os.environ, **names})
tasks = [start(task) for task in range(2)]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
def test_warned_before_its_limit(tmp_path, tiny_base):
    config = write_config(tmp_path / "job", tiny_base, run={"max_steps": 200}, checkpoint={"save_steps": 1000})
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, program in {"scontrol": SCONTROL, "srun": SRUN, "ds-higgs": DS_HIGGS}.items():
        (commands / name).write_text(program)
        (commands / name).chmod(0o755)
    environment = launching.free_environment(
        {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7", "MASTER_PORT": launching.free_port()}
    )
    environment["PATH"] = f"{commands}:{environment['PATH']}"
    job = subprocess.Popen(
        ["bash", "launch/train_slurm.sbatch", "-c", str(config)],
        cwd=launching.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run_dir: Path = config.parent / "run"
    while last_step(run_dir) < 2 and job.poll() is None:
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=HANG_S)
    assert job.returncode == 0, output
    assert "requeued 7" in output
    assert check_all_whole(run_dir) == [last_step(run_dir)]
