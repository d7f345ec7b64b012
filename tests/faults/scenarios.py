"""What can happen to a run, as functions that the short and the long form share; each raises where a promise is broken.

A scenario hits one run again and again, starts it anew with the same command each time, and in the end compares what
came out with a run that nobody disturbed: losses and adapter bit for bit.
"""

import json
import random
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_higgs.checkpoint import find_checkpoint
from ds_higgs.checkpoint.folders import list_checkpoints
from ds_higgs.checkpoint.marker import read_marker
from tests.faults.job import Job, last_step, read_metrics, result, step_numbers, write_config
from tests.support import launching
from tests.support.patience import HANG_S

SIGNAL_LIMIT_S = 60
FAILURE_LIMIT_S = 30


@dataclass(frozen=True)
class Hit:
    """One blow: what was done, at which step, in a save or not, how long the job's last process took to go."""

    what: str
    step: int
    in_save: bool
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.what:34} step {self.step:3}  {'in a save' if self.in_save else '         '}  {self.seconds:5.1f} s"
        )


def run_to_the_end(config: Path, **options) -> tuple:
    """Run, or go on with, a job; what came out of it."""
    job = Job(config, **options)
    status = job.finish()
    assert status == 0, job.output[-4000:]
    return result(job.run_dir)


def run_in_forks(config: Path) -> tuple:
    """The same without a launcher, which takes half the time: for runs that nothing happens to."""
    done = launching.run_ranks(2, "-m", "ds_higgs", "train", "-c", config)
    assert done.returncode == 0, done.stdout[-4000:]
    return result(config.parent / "run")


def kill_everything(config: Path, moments: Iterable[str], chance: random.Random) -> list[Hit]:
    """SIGKILL for all processes of the job, at moments "start", "step", "save" or "disk".

    "disk" is while the disk is written, and its hits count as in a save where that was so when all had ended.
    """
    hits = []
    for moment in moments:
        job = Job(config)
        assert _wait_for(job, moment, chance), f"the run ended before it could be hit:\n{job.output[-4000:]}"
        started = time.monotonic()
        job.kill()
        seconds = time.monotonic() - started
        in_save = job.is_writing() if moment == "disk" else job.is_saving()
        hits.append(Hit(f"SIGKILL to all, at a {moment}", last_step(job.run_dir), in_save, seconds))
    return hits


def _wait_for(job: Job, moment: str, chance: random.Random) -> bool:
    if moment == "start":
        time.sleep(chance.uniform(0.5, 8))
        return job.launcher.poll() is None
    if not job.wait_for_steps(chance.randint(0, 2)):
        return False
    if moment == "step":
        reached = job.wait_for_steps(1)
        time.sleep(chance.uniform(0, 0.5))
        return reached and job.launcher.poll() is None
    assert moment in ("save", "disk"), moment
    reached = job.wait_for_save() if moment == "save" else job.wait_until(job.is_writing)
    time.sleep(chance.uniform(0, 0.04))
    return reached


def send_signals(config: Path, blows: Iterable[tuple[signal.Signals, str]], chance: random.Random) -> list[Hit]:
    """A stop signal to a rank, to `deepspeed` or to its `launch` child: the job saves and is gone in time."""
    hits = []
    for number, target in blows:
        job = Job(config)
        assert job.wait_for_steps(chance.randint(1, 2)), job.output[-4000:]
        time.sleep(chance.uniform(0, 0.5))
        _find_target(job, target, chance).send_signal(number)
        seconds = job.wait_until_gone(SIGNAL_LIMIT_S)
        step = last_step(job.run_dir)
        assert "to go on: deepspeed" in job.output, job.output[-4000:]
        newest = find_checkpoint(job.run_dir, resume="auto")
        assert newest is not None
        assert read_marker(newest).step == step, f"{newest} is not of the last step, {step}"
        hits.append(Hit(f"{number.name} to {target}", step, False, seconds))
    return hits


def _find_target(job: Job, target: str, chance: random.Random):
    if target == "rank":
        return job.rank(chance.randrange(job.ranks))
    return {"deepspeed": job.launcher, "launch": job.launch_child()}[target]


def start_again(config: Path, times: int) -> list[Hit]:
    """Other starts in the folder of a run that goes on: each is told who has it, and the run is not disturbed."""
    job = Job(config)
    assert job.wait_for_steps(1), job.output[-4000:]
    hits = [start_beside(job) for _ in range(times)]
    stop(job)
    check_all_whole(job.run_dir)
    assert not (job.run_dir / "failure.txt").exists()
    steps = [line["step"] for line in step_numbers(job.run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    return hits


def start_beside(job: Job) -> Hit:
    """One other start in the folder of a job that goes on."""
    before, started = last_step(job.run_dir), time.monotonic()
    second = launching.run_ds_higgs("train", "-c", job.config)
    assert second.returncode == 2, second.stdout
    assert f"in use by process {job.rank(0).pid} on {socket.gethostname()}, started " in second.stdout
    assert "Traceback" not in second.stdout
    assert last_step(job.run_dir) > before
    return Hit("a second start", before, job.is_saving(), time.monotonic() - started)


def suspend_all_ranks(config: Path, times: int, *, seconds: float) -> list[Hit]:
    """SIGSTOP to both ranks, as when a container is suspended: the run goes on afterwards as if nothing had been."""
    job = Job(config)
    hits = []
    for _ in range(times):
        assert job.wait_for_step(last_step(job.run_dir) + 1), job.output[-4000:]
        before, started = last_step(job.run_dir), time.monotonic()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in range(job.ranks):
                job.rank(rank).send_signal(number)
            if number == signal.SIGSTOP:
                time.sleep(seconds)
        assert job.wait_for_step(before + 2), job.output[-4000:]
        hits.append(Hit(f"both ranks suspended for {seconds:.0f} s", before, False, time.monotonic() - started))
    job.rank(0).send_signal(signal.SIGTERM)
    job.wait_until_gone(SIGNAL_LIMIT_S)
    assert not (job.run_dir / "failure.txt").exists()
    return hits


def hang_up(config: Path, times: int, chance: random.Random) -> list[Hit]:
    """The terminal of a job goes away: its launcher ends at once, its ranks save."""
    hits = []
    for _ in range(times):
        job = Job(config, in_terminal=True)
        assert job.wait_for_steps(chance.randint(1, 2)), job.output[-4000:]
        time.sleep(chance.uniform(0, 0.5))
        job.terminal.hang_up()
        seconds = job.wait_until_gone(SIGNAL_LIMIT_S)
        step = last_step(job.run_dir)
        assert read_metrics(job.run_dir)[-1]["event"] == "end"
        newest = find_checkpoint(job.run_dir, resume="auto")
        assert newest is not None
        assert read_marker(newest).step == step, f"{newest} is not of the last step, {step}"
        hits.append(Hit("terminal hang-up", step, False, seconds))
    return hits


def stop_in_a_validation(config: Path, *, rank: int, number: int) -> int:
    """SIGTERM to one rank as a validation of its launch begins: all leave it undone and save; the step."""
    job = Job(config, module="tests.faults.faulty_train", env={"FAULT": f"{rank}:{number}:validation"})
    assert job.finish() == 0, job.output[-4000:]
    assert "to go on: deepspeed" in job.output, job.output[-4000:]
    step = last_step(job.run_dir)
    newest = find_checkpoint(job.run_dir, resume="auto")
    assert newest is not None
    assert read_marker(newest).step == step, f"{newest} is not of the last step, {step}"
    assert not [line for line in read_metrics(job.run_dir) if line["event"] == "eval" and line["step"] == step]
    return step


def stop(job: Job) -> None:
    """Let a job save and end, by a signal to its launcher."""
    job.launcher.send_signal(signal.SIGUSR1)
    job.wait_until_gone(SIGNAL_LIMIT_S)
    assert "to go on: deepspeed" in job.output, job.output[-4000:]


def kill_one_rank(config: Path, ranks: Iterable[int], chance: random.Random) -> list[Hit]:
    """SIGKILL for one rank: the others end in time and say who died."""
    hits = []
    for rank in ranks:
        job = Job(config)
        assert job.wait_for_steps(chance.randint(1, 2)), job.output[-4000:]
        time.sleep(chance.uniform(0, 0.5))
        step = last_step(job.run_dir)
        job.rank(rank).send_signal(signal.SIGKILL)
        seconds = job.wait_until_gone(FAILURE_LIMIT_S)
        _check_failure(job, f"rank {rank} died without a message")
        hits.append(Hit(f"SIGKILL to rank {rank}", step, False, seconds))
    return hits


def raise_in_one_rank(config: Path, faults: Iterable[tuple[int, int, str]]) -> list[Hit]:
    """An exception in one rank at a step of its launch: all end in time, its message is shown and kept."""
    messages = {"raise": "ArithmeticError: a fault that was built in", "oom": "CUDA out of memory"}
    hits = []
    for rank, step, kind in faults:
        # metrics.jsonl may be a step ahead of the newest checkpoint, from which this launch counts its calls
        newest = find_checkpoint(config.parent / "run", resume="auto")
        begin = int(newest.name.removeprefix("step-")) if newest else 0
        job = Job(config, module="tests.faults.faulty_train", env={"FAULT": f"{rank}:{step}:{kind}"})
        assert job.wait_for_step(begin + step - 1), job.output[-4000:]
        seconds = job.wait_until_gone(FAILURE_LIMIT_S)
        _check_failure(job, messages[kind])
        last_words = [line for line in job.output.splitlines() if "[INFO]" not in line and "[ERROR]" not in line][-1]
        assert messages[kind] in last_words, job.output[-4000:]
        hits.append(Hit(f"{kind} in rank {rank}", last_step(job.run_dir), False, seconds))
    return hits


def _check_failure(job: Job, message: str) -> None:
    status = job.launcher.wait(timeout=HANG_S)
    assert status != 0, "a failed job ended with status 0"
    assert message in job.output, job.output[-4000:]
    assert message in (job.run_dir / "failure.txt").read_text()


def damage_the_newest(run_dir: Path) -> list[str]:
    """Truncate, corrupt and delete each file of the newest checkpoint in turn: the one before it is taken."""
    newest, older = list_checkpoints(run_dir / "checkpoints")[:2]
    done = []
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for fault, damaged in _damages(content).items():
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            assert find_checkpoint(run_dir, resume="auto") == older, f"{path.name}: {fault} was not noticed"
            path.write_bytes(content)
            done.append(f"{path.name} {fault}")
    assert find_checkpoint(run_dir, resume="auto") == newest
    return done


def _damages(content: bytes) -> dict[str, bytes | None]:
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]
    return {"truncated": content[:middle], "corrupted": flipped, "deleted": None}


def check_all_whole(run_dir: Path) -> list[int]:
    """The steps of all checkpoints, each of which is complete and undamaged."""
    found = list_checkpoints(run_dir / "checkpoints")
    for path in found:
        assert find_checkpoint(run_dir, resume=str(path)) == path
    assert not list((run_dir / "checkpoints").glob(".partial-*"))
    return [read_marker(path).step for path in found]


def same(outcome: tuple, reference: tuple) -> None:
    """Compare `result`s part by part, so that a difference says where it is."""
    for ours, theirs in zip(outcome[0], reference[0], strict=True):
        assert ours == theirs, f"step {ours['step']} differs"
    assert outcome[1] == reference[1], "validation differs"
    assert outcome[2] == reference[2], "the adapter differs"


def stop_after(config: Path, step: int, **options) -> Path:
    """Run a job that is stopped by SIGTERM after exactly this step (2 at least) of its launch; its run folder."""
    env = {"FAULT": f"0:{step - 1}:stop", **options.pop("env", {})}
    job = Job(config, module="tests.faults.faulty_train", env=env, **options)
    assert job.finish() == 0, job.output[-4000:]
    assert last_step(job.run_dir) == job.first_step + step, job.output[-4000:]
    return job.run_dir


def resume_is_exact(folder: Path, base: Path, **overrides: dict) -> None:
    """Stopped in the middle and resumed, the run computes what it computes undisturbed."""
    overrides["run"] = {"max_steps": 6, **overrides.get("run", {})}
    overrides["checkpoint"] = {"save_steps": 100}
    reference = run_to_the_end(write_config(folder / "undisturbed", base, **overrides))
    config = write_config(folder / "stopped", base, **overrides)
    stop_after(config, 3)
    same(run_to_the_end(config), reference)


# Micro-batches per step, the same global batch of 6 samples on every number of ranks.
ACCUMULATION = {1: 6, 2: 3, 3: 2}


def change_the_number_of_ranks(
    folder: Path, base: Path, ranks: int, other_ranks: int, *, stage: int = 2, **overrides: dict
) -> float:
    """Half an epoch on some ranks and half on others: every sample once, and the losses of one that did not change.

    Returns:
        The largest relative difference of any loss or gradient norm.
    """
    settings = {
        "run": {"max_steps": None, "epochs": 1},
        "lora": {"dropout": 0.0},
        "zero": {"stage": stage, "precision": "fp32"},
        "data": {"batch_size": 1},
        "checkpoint": {"save_steps": 100},
        **overrides,
    }
    steps = [_accumulating(ranks), _accumulating(other_ranks)]
    reference = write_config(folder / "unchanged", base, **settings)
    expected, _, _ = run_to_the_end(reference, ranks=ranks, arguments=steps[0])
    config = write_config(folder / "changed", base, **settings)
    seen = folder / "seen"
    seen.mkdir()
    stop_after(config, 2, ranks=ranks, arguments=steps[0], env={"RECORD": str(seen)})
    recording = {"module": "tests.faults.faulty_train", "env": {"RECORD": str(seen)}}
    losses, _, _ = run_to_the_end(config, ranks=other_ranks, arguments=steps[1], **recording)
    _check_every_sample_once(seen)
    return max(differences([line[key] for line in losses], [line[key] for line in expected]) for key in _COMPARED)


_COMPARED = ("loss", "text_loss", "audio_loss", "grad_norm")


def _accumulating(ranks: int) -> tuple[str, str]:
    return "--optim.gradient_accumulation_steps", str(ACCUMULATION[ranks])


def _check_every_sample_once(seen: Path) -> None:
    lines = [line for path in seen.iterdir() for line in path.read_text().splitlines()]
    samples = sorted(sample for line in lines for sample in json.loads(line))
    train = json.loads((launching.ROOT / "examples" / "voice_cloning" / "train.json").read_text())
    assert len(samples) == len(set(samples)) == len(train), samples


def differences(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(one - other) / abs(other) for one, other in zip(losses, reference, strict=True))
