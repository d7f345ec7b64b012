"""The Slurm script, with Slurm's own two programs played by the test: ranks, the signal before the limit, the queue."""

import os
import signal
import stat
import subprocess
import time

from tests.support.launching import ROOT, free_environment

# Starts two tasks as srun does, with Slurm's variables, and hands SIGUSR1 on to them.
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys
def start(task):
    return subprocess.Popen(sys.argv[1:], env={**os.environ, "SLURM_PROCID": task, "SLURM_LOCALID": task})
tasks = [start("0"), start("1")]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>"$SLURM_TEST_QUEUE"; fi
"""
DS_HIGGS = '#!/usr/bin/env bash\nexec python -m ds_higgs "$@"\n'


def test_signal_before_the_limit_saves_and_queues_the_job_again(tiny_base, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ds-higgs": DS_HIGGS}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    env = free_environment(
        {
            "SLURM_JOB_NODELIST": "node0",
            "SLURM_JOB_ID": "77",
            "SLURM_NTASKS": "2",
            "SLURM_TEST_QUEUE": str(tmp_path / "queue"),
            "MASTER_PORT": str(20000 + os.getpid() % 20000),
        }
    )
    env["PATH"] = f"{programs}:{env['PATH']}"
    run_dir = tmp_path / "run"
    keys = {
        "run.output_dir": run_dir,
        "model.base": tiny_base,
        "data.cache_dir": tmp_path / "codes",
        "run.epochs": 1000,
    }
    flags = [str(part) for key, value in keys.items() for part in (f"--{key}", value)]
    job = subprocess.Popen(
        ["bash", "launch/train_slurm.sbatch", "-c", "examples/voice_cloning/config.yaml", *flags],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = run_dir / "metrics.jsonl"
    waited = time.monotonic()
    while not (metrics.exists() and '"event": "step"' in metrics.read_text()):
        assert job.poll() is None, job.stdout.read()[-4000:]
        assert time.monotonic() - waited < 240
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)

    assert job.returncode == 0, output[-4000:]
    assert "stopped and saved" in output
    assert (tmp_path / "queue").read_text() == "requeue 77\n"
    assert list((run_dir / "checkpoints").glob("step-*/complete.json"))
