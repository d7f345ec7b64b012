"""A training job under the real launcher that can be hit at chosen moments, and what is left of it afterwards."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from tests.faults.terminal import Terminal
from tests.support import launching
from tests.support.patience import HANG_S, patience

# What a step line says about the numbers; the rest is about time and memory.
NUMBERS = (
    "step",
    "epoch",
    "loss",
    "text_loss",
    "audio_loss",
    "audio_loss_per_codebook",
    "learning_rate",
    "grad_norm",
    "num_samples",
    "num_tokens",
    "num_text_targets",
    "num_audio_targets",
)


def write_config(folder: Path, base: Path, **overrides: Mapping[str, object]) -> Path:
    """The example's configuration, saving at every step, in bf16 with LoRA dropout; `overrides` by section."""
    example = launching.ROOT / "examples" / "voice_cloning"
    config: dict[str, dict] = {
        "run": {"output_dir": str(folder / "run"), "max_steps": 24, "epochs": 20},
        "model": {"base": str(base)},
        "lora": {"rank": 4, "dropout": 0.1},
        "data": {
            "train_manifest": str(example / "train.json"),
            "val_manifest": str(example / "val.json"),
            "cache_dir": str(folder.parent / "codes"),
            "batch_size": 2,
        },
        "optim": {"learning_rate": 1e-3, "warmup_steps": 2},
        "zero": {"stage": 2, "precision": "bf16"},
        "checkpoint": {"save_steps": 1, "keep_latest": 2},
        "eval": {"eval_steps": 8, "max_batches": 1},
        "logging": {"tensorboard": False},
    }
    for section, values in overrides.items():
        config.setdefault(section, {}).update(values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Job:
    """One launch of `train`, in a session of its own, and all processes that it starts."""

    config: Path
    ranks: int = 2
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    module: str = "ds_higgs"
    in_terminal: bool = False

    def __post_init__(self) -> None:
        self.run_dir = Path(yaml.safe_load(self.config.read_text())["run"]["output_dir"])
        self.log = self.config.parent / "job.log"
        self.first_step = last_step(self.run_dir)
        train = ("--module", self.module, "train", "-c", str(self.config), *self.arguments)
        command = [str(part) for part in launching.deepspeed(self.ranks, *train)]
        options = {"cwd": launching.ROOT, "env": launching.free_environment(self.env)}
        if self.in_terminal:
            self.terminal = Terminal(self.log)
            self.launcher = self.terminal.start(command, psutil.Popen, **options)
        else:
            with self.log.open("wb") as output:
                self.launcher = psutil.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
                )
        self.known: dict[int, psutil.Process] = {self.launcher.pid: self.launcher}

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Everything that the job started and that still runs, orphans too."""
        for process in list(self.known.values()):
            try:
                self.known |= {child.pid: child for child in process.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue
        return [process for process in self.known.values() if _runs(process)]

    def launch_child(self) -> psutil.Process:
        """The `deepspeed.launcher.launch` process between the launcher and the ranks."""
        [child] = self.launcher.children()
        return child

    def rank(self, number: int) -> psutil.Process:
        [process] = [p for p in self.launch_child().children() if p.environ().get("RANK") == str(number)]
        return process

    def wait_until(self, condition: Callable[[], bool], *, poll_s: float = 0.002) -> bool:
        """Wait for a moment of the run; False where the job ended before it came."""
        deadline = time.monotonic() + HANG_S
        while not condition():
            if self.launcher.poll() is not None:
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self.output[-4000:])
            time.sleep(poll_s)
        return True

    def wait_for_steps(self, count: int) -> bool:
        """Until the run is `count` steps further than any launch before had brought it."""
        return self.wait_for_step(self.first_step + count)

    def wait_for_step(self, step: int) -> bool:
        """Until the run has made this step."""
        reached = self.wait_until(lambda: last_step(self.run_dir) >= step, poll_s=0.02)
        self.processes()  # known while they are still related
        return reached

    def wait_for_save(self) -> bool:
        """Until a save is being written."""
        return self.wait_until(self.is_saving)

    def is_saving(self) -> bool:
        """Whether this launch has an unfinished checkpoint: earlier ones are gone before its first new step."""
        unfinished = any((self.run_dir / "checkpoints").glob(".partial-*"))
        return unfinished and last_step(self.run_dir) > self.first_step

    def is_writing(self) -> bool:
        """Whether some rank's last file of this launch's unfinished checkpoint is not there yet."""
        unfinished = next((self.run_dir / "checkpoints").glob(".partial-*"), None)
        if unfinished is None or last_step(self.run_dir) == self.first_step:
            return False
        written = {path.name for path in unfinished.glob("*")}
        last_files = {"state.json", *(f"rank-{rank:05d}.safetensors" for rank in range(self.ranks))}
        return not last_files <= written

    def wait_until_gone(self, timeout_s: float) -> float:
        """Seconds until no process of the job was left: `timeout_s` at most, more on a busy machine.

        Raises:
            TimeoutError: some were left; they are killed.
        """
        started = time.monotonic()
        while left := self.processes():
            if time.monotonic() - started > patience(timeout_s):
                described = [f"{process.pid} {process.cmdline()[:6]}" for process in left if _runs(process)]
                self.kill()
                raise TimeoutError(f"still running after {timeout_s} s: {described}\n{self.output[-4000:]}")
            time.sleep(0.05)
        return time.monotonic() - started

    def kill(self) -> None:
        """SIGKILL for every process at once, as when a machine goes away."""
        with suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)  # the session's one process group
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.launcher.wait(timeout=HANG_S)
        deadline = time.monotonic() + HANG_S
        # Zombies have ended: in a container whose first process reaps nobody, orphans stay that for ever.
        while left := [process for process in self.known.values() if _runs(process)]:
            assert time.monotonic() < deadline, f"not to be killed: {left}"
            time.sleep(0.02)

    def finish(self, timeout_s: float = HANG_S) -> int:
        """Wait for the launcher; its exit status."""
        try:
            return self.launcher.wait(timeout=timeout_s)
        finally:
            self.kill()


def last_step(run_dir: Path) -> int:
    """The step of the last step line, 0 before the first one."""
    return max((line["step"] for line in read_metrics(run_dir) if line["event"] == "step"), default=0)


def read_metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def step_numbers(run_dir: Path) -> list[dict]:
    """What the steps computed, without times."""
    return [{key: line[key] for key in NUMBERS} for line in read_metrics(run_dir) if line["event"] == "step"]


def eval_numbers(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir) if line["event"] == "eval"]


def adapter_hash(run_dir: Path) -> str:
    [weights] = (run_dir / "adapters" / "final").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def result(run_dir: Path) -> tuple:
    """Everything that must not depend on how often a run was stopped."""
    return step_numbers(run_dir), eval_numbers(run_dir), adapter_hash(run_dir)


@contextmanager
def tmpfs(folder: Path, *, size_mib: int) -> Iterator[None]:
    """A small file system in memory; needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
