"""A rank that works in collectives until it fails in the way that its environment asks for.

DS_HIGGS_FAULT is "RANK:KIND"; the other ranks only see a collective that does not come back.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ds_higgs.errors import UserError
from ds_higgs.job.failures import FailureWatch
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.job.stopping import StopRequests


def fail(kind: str, run_dir: Path) -> None:
    (run_dir / "blow").touch()  # its time is what limits count from
    if kind == "raise":
        threading.Thread(target=end_as_launchers_do, args=(run_dir,), daemon=True).start()
        raise FloatingPointError("the answer is not 42")
    if kind == "user":
        raise UserError("train.json:3: no audio")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "suspend":
        subprocess.Popen(["sh", "-c", f"sleep 26; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)


def end_as_launchers_do(run_dir: Path) -> None:
    """SIGTERM for this rank as soon as another one can have gone, while it still has to say why."""
    while not (run_dir / "failure.txt").exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def work(run_dir: Path, is_faulty: bool, kind: str) -> None:
    for step in range(20):
        if step == 5 and is_faulty:
            fail(kind, run_dir)
        if step == 5 and os.environ.get("DS_HIGGS_HANG"):
            time.sleep(300)  # a collective that never ends, as with NCCL
        dist.all_reduce(torch.ones(1))
        time.sleep(0.05)


def main() -> None:
    run_dir = Path(sys.argv[-1])
    (run_dir / "config.yaml").touch()  # a run's folder
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulty, kind = os.environ["DS_HIGGS_FAULT"].split(":")
    with FailureWatch(run_dir, rank=rank, world_size=world_size):
        if (str(rank), "early") == (faulty, kind):
            fail("raise", run_dir)
        dist.init_process_group("gloo")
        with StopRequests():
            work(run_dir, faulty in (str(rank), "all"), kind)
    dist.destroy_process_group()
    print(f"rank {rank} is through", flush=True)


if __name__ == "__main__":
    run_and_exit(main)
