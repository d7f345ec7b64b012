"""Checkpoints of real DeepSpeed engines on two ranks: exact resume, strict loading, failed writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("checkpoint_worker.py")
CASES = (
    "resume_is_exact",
    "frozen_weights_are_left_out",
    "config_wins",
    "other_shapes_are_refused",
    "one_ranks_full_disk_is_told_to_all",
)


def run_cases(cases: tuple[str, ...], folder: Path, *, stage: int, precision: str, ranks: int, port: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    arguments = [str(WORKER), ",".join(cases), str(folder), str(stage), precision]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_two_ranks(tmp_path, stage, precision):
    cases = CASES if stage else CASES[:-1]  # stage 0 writes no shards
    run_cases(cases, tmp_path, stage=stage, precision=precision, ranks=2, port=29400 + 10 * stage + len(precision))
