"""One trial of `ds-higgs tune`: a few training steps in fresh processes, which may run out of memory or time."""

import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_higgs.config import Config
from ds_higgs.config.file import write_config
from ds_higgs.run_folder import RunFolder

OUT_OF_MEMORY_SIGNS = ("out of memory", "OutOfMemoryError", "DefaultCPUAllocator: can't allocate", "Signal 9 (SIGKILL)")
LOG_FILE = "trial.log"


@dataclass(frozen=True)
class TrialResult:
    """status: "ok", "out of memory", "timeout" or "failed", with the reason in `detail`.

    tokens_per_second: over all ranks, median of the counted steps; 0 where the trial did not end well.
    peak_memory_gib: largest of the counted steps.
    """

    status: str
    tokens_per_second: float = 0.0
    step_time_s: float = 0.0
    peak_memory_gib: float = 0.0
    detail: str = ""


def run_trial(config: Config, folder: Path, *, num_processes: int, warmup_steps: int, timeout_s: float) -> TrialResult:
    """Train with `config` in `folder` by torchrun and read its metrics; only those and the log are kept.

    Args:
        config: its run.max_steps has to exceed `warmup_steps`, which do not count.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_config(config, folder / "trial.yaml")
    arguments = ["-m", "ds_higgs", "train", "-c", str(folder / "trial.yaml")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    with (folder / LOG_FILE).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *launcher, *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return TrialResult("timeout", detail=f"not done after {timeout_s:.0f} s")
        finally:
            _end_group(process)
            _drop_checkpoints(folder)
    if status != 0:
        return _read_failure(folder / LOG_FILE, status)
    return read_metrics(RunFolder.open(config.run.output_dir).events("step"), warmup_steps=warmup_steps)


def read_metrics(steps: Sequence[Mapping[str, Any]], *, warmup_steps: int) -> TrialResult:
    """Throughput and memory of the steps after the first `warmup_steps`."""
    counted = steps[warmup_steps:]
    if not counted:
        return TrialResult("failed", detail=f"made {len(steps)} steps, of which {warmup_steps} are warm-up")
    return TrialResult(
        "ok",
        tokens_per_second=statistics.median(step["tokens_per_second"] for step in counted),
        step_time_s=statistics.median(step["step_time_s"] for step in counted),
        peak_memory_gib=max(step["peak_memory_gib"] for step in counted),
    )


def _read_failure(log: Path, status: int) -> TrialResult:
    text = log.read_text(errors="replace")
    if any(sign in text for sign in OUT_OF_MEMORY_SIGNS):
        return TrialResult("out of memory")
    errors = [line for line in text.splitlines() if "Error" in line and "ChildFailedError" not in line]
    ours = [line for line in text.splitlines() if line.startswith("ds-higgs:")]
    detail = (ours or errors or [f"exit status {status}"])[-1]
    return TrialResult("failed", detail=f"{detail.strip()[:200]} (see {log})")


def _end_group(process: subprocess.Popen) -> None:
    """Leave none of the trial's processes behind, whatever became of the launcher."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _drop_checkpoints(folder: Path) -> None:
    run = RunFolder(folder / "run")
    for kept in (run.checkpoints, run.adapters):
        shutil.rmtree(kept, ignore_errors=True)
