"""The long form of the fault harness: many blows at random moments, with a report.

    python -m tests.faults.long_form --report tests/faults/report.md            everything, about 25 minutes
    python -m tests.faults.long_form --report REPORT.md --only signals damage   some parts

The report is written part by part, so that a run that was cut short says how far it came.
"""

import argparse
import os
import platform
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path

from ds_higgs.checkpoint import find_checkpoint
from ds_higgs.checkpoint.folders import list_checkpoints
from ds_higgs.model.tiny import write_tiny_base
from tests.faults import scenarios
from tests.faults.job import Job, read_metrics, tmpfs, write_config
from tests.support import launching

STEPS = {"max_steps": 120}  # more than all blows of a part let through


@dataclass
class Bench:
    """What the parts share."""

    folder: Path
    base: Path
    chance: random.Random
    counts: argparse.Namespace
    part_started: float = 0.0
    _undisturbed: tuple | None = None

    @property
    def undisturbed(self) -> tuple:
        if self._undisturbed is None:
            config = write_config(self.folder / "undisturbed", self.base, run=STEPS)
            self._undisturbed = scenarios.run_to_the_end(config)
        return self._undisturbed

    def has_time(self) -> bool:
        """Whether a part may hit once more: `--minutes` ends it early, and the report then says how far it came."""
        return time.monotonic() - self.part_started < 60 * self.counts.minutes

    def config(self, name: str) -> Path:
        return write_config(self.folder / name, self.base, run=STEPS)


def kills(bench: Bench) -> list[str]:
    """SIGKILL of the whole job at random moments, half of them or more in a save; then on to the end."""
    config, reference, hits = bench.config("kills"), bench.undisturbed, []
    wanted = bench.counts.kills
    while (len(hits) < wanted or sum(hit.in_save for hit in hits) < wanted / 2) and bench.has_time():
        moment = bench.chance.choice(["start", "step", "save", "save", "save", "save"])
        hits += scenarios.kill_everything(config, [moment], bench.chance)
        print(f"{len(hits):3} {hits[-1]}", flush=True)
    scenarios.same(scenarios.run_to_the_end(config), reference)
    in_save = sum(hit.in_save for hit in hits)
    return [
        f"{len(hits)} kills, {in_save} in a save; then losses and adapter as undisturbed, bit for bit",
        *map(str, hits),
    ]


def full(bench: Bench) -> list[str]:
    """`kills` of a run that trains all weights, saves in the background, and is hit while the disk is written."""
    settings = {"run": {"max_steps": 40}, "train": {"mode": "full"}, "lora": {"rank": 16, "dropout": 0.05}}
    settings["optim"] = {"learning_rate": 1e-4, "warmup_steps": 2}
    reference = scenarios.run_to_the_end(write_config(bench.folder / "full-undisturbed", bench.base, **settings))
    config = write_config(bench.folder / "full", bench.base, checkpoint={"async": True}, **settings)
    hits: list[scenarios.Hit] = []
    wanted = bench.counts.full_kills

    def at_the_disk() -> int:
        return sum(hit.in_save and hit.what.endswith("disk") for hit in hits)

    while (len(hits) < wanted or at_the_disk() < wanted / 2) and bench.has_time():
        moment = bench.chance.choice(["step", "disk", "disk", "disk"])
        hits += scenarios.kill_everything(config, [moment], bench.chance)
        print(f"{len(hits):3} {hits[-1]}", flush=True)
    scenarios.same(scenarios.run_to_the_end(config), reference)
    return [
        f"{len(hits)} kills, {at_the_disk()} while the disk was written; then losses and weights as undisturbed "
        "with saves that are waited for, bit for bit",
        *map(str, hits),
    ]


def signals(bench: Bench) -> list[str]:
    """SIGTERM and SIGUSR1 at random moments, to a rank, to `deepspeed`, to `launch`; then on to the end."""
    config, reference = bench.config("signals"), bench.undisturbed
    targets = list(islice(cycle(["rank", "deepspeed", "launch"]), bench.counts.signals))
    blows = [(number, target) for target in targets for number in (signal.SIGTERM, signal.SIGUSR1)]
    hits = []
    for blow in blows:
        if bench.has_time():
            hits += scenarios.send_signals(config, [blow], bench.chance)
            print(f"{len(hits):3} {hits[-1]}", flush=True)
    scenarios.same(scenarios.run_to_the_end(config), reference)
    slowest = max(hit.seconds for hit in hits)
    return [
        f"{len(hits)} signals of {len(blows)}, slowest end {slowest:.1f} s; then as undisturbed, bit for bit",
        *map(str, hits),
    ]


def failures(bench: Bench) -> list[str]:
    """One rank killed, one rank raising, one out of memory, at random moments; then on to the end."""
    config, reference = bench.config("failures"), bench.undisturbed
    ranks = list(islice(cycle([0, 1]), bench.counts.failures))
    hits = scenarios.kill_one_rank(config, ranks, bench.chance)
    kinds = zip(ranks, cycle(["raise", "raise", "oom"]), strict=False)
    hits += scenarios.raise_in_one_rank(config, [(rank, bench.chance.randint(2, 4), kind) for rank, kind in kinds])
    scenarios.same(scenarios.run_to_the_end(config), reference)
    slowest = max(hit.seconds for hit in hits)
    return [f"{len(hits)} failures, slowest end {slowest:.1f} s; then as undisturbed, bit for bit", *map(str, hits)]


def damage(bench: Bench) -> list[str]:
    """Every file of the newest checkpoint truncated, corrupted, deleted: refused by name, exit 2 for its path."""
    assert bench.undisturbed
    run_dir = bench.folder / "undisturbed" / "run"
    refused = scenarios.damage_the_newest(run_dir)
    newest = find_checkpoint(run_dir, resume="auto")
    assert newest is not None
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        done = launching.run(
            launching.ds_higgs("train", "-c", bench.config("damage"), "--checkpoint.resume", newest), timeout_s=120
        )
        path.write_bytes(content)
        assert done.returncode == 2, done.stdout
        assert path.name in done.stdout, done.stdout
        refused.append(f"{path.name} truncated, explicit path: exit 2")
    return [f"{len(refused)} damages, all refused with the file's name", *refused]


def disk(bench: Bench) -> list[str]:
    """A disk that fills up, and one that becomes read-only: the old checkpoints stay whole."""
    return [_full_disk(bench, policy) for policy in ("stop", "warn")] + [_read_only(bench)]


def _full_disk(bench: Bench, policy: str) -> str:
    config = write_config(
        bench.folder / f"full-{policy}",
        bench.base,
        run={"max_steps": 12},
        checkpoint={"save_steps": 1, "keep_latest": 100, "on_save_error": policy},
        data={"cache_dir": str(bench.folder / "codes")},
    )
    with tmpfs(config.parent / "run", size_mib=8):
        job = Job(config)
        status = job.finish()
        assert status not in (0, 2), job.output[-4000:]
        assert "No space left on device" in job.output, job.output[-4000:]
        whole = scenarios.check_all_whole(job.run_dir)
        assert whole, "the disk was full before the first checkpoint"
        events = [line["event"] for line in read_metrics(job.run_dir)]
        assert ("save_error" in events) == (policy == "warn")
        return f"full disk, {policy}: exit {status}, checkpoints of steps {sorted(whole)} whole"


def _read_only(bench: Bench) -> str:
    config = bench.config("read-only")
    with tmpfs(config.parent / "run", size_mib=64):
        job = Job(config)
        assert job.wait_for_steps(3), job.output[-4000:]
        with read_only(job.run_dir):
            status = job.finish()
        assert status not in (0, 2), job.output[-4000:]
        assert "Read-only file system" in job.output, job.output[-4000:]
        found = list_checkpoints(job.run_dir / "checkpoints")
        whole = [path.name for path in found if find_checkpoint(bench.folder, resume=str(path))]
        return f"read-only folder: exit {status}, {', '.join(whole)} whole"


def ranks(bench: Bench) -> list[str]:
    """Half an epoch on N ranks, half on M: every sample once, the same losses."""
    rows = []
    for stage in (1, 2, 3):
        for few, many in [(2, 1), (1, 2), (2, 3)]:
            folder = bench.folder / f"ranks-{stage}-{few}-{many}"
            difference = scenarios.change_the_number_of_ranks(folder, bench.base, few, many, stage=stage)
            assert difference < 1e-6, difference
            rows.append(f"stage {stage}, {few} to {many} ranks: largest relative difference {difference:.1e}")
    return ["every sample once; losses within 1e-6 of the run that did not change", *rows]


def exact(bench: Bench) -> list[str]:
    """Stopped by SIGTERM in the middle and resumed, over stages, precisions and everything that has a state."""
    together = {
        "memory": {"activation_checkpointing": "full"},
        "data": {"num_workers": 2, "max_tokens": 700},
    }
    rows = []
    for stage, precision in [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp32"), (2, "fp32"), (3, "fp32")]:
        zero = {"stage": stage, "precision": precision}
        scenarios.resume_is_exact(bench.folder / f"exact-{stage}-{precision}", bench.base, zero=zero, **together)
        rows.append(f"stage {stage} {precision}: bit for bit")
    return ["with LoRA dropout, activation checkpointing, 2 data workers and a token budget", *rows]


def suspensions(bench: Bench) -> list[str]:
    """Both ranks suspended for longer than the watch's patience, again and again; then on to the end."""
    config, reference = bench.config("suspensions"), bench.undisturbed
    hits = scenarios.suspend_all_ranks(config, bench.counts.suspensions, seconds=30)
    scenarios.same(scenarios.run_to_the_end(config), reference)
    return [f"{len(hits)} suspensions, 0 false ends; then as undisturbed, bit for bit", *map(str, hits)]


def hang_ups(bench: Bench) -> list[str]:
    """The job's terminal goes away at random moments; then on to the end."""
    assert signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN, "under nohup a run ignores the end of its terminal"
    config, reference = bench.config("hang-ups"), bench.undisturbed
    hits = scenarios.hang_up(config, bench.counts.hang_ups, bench.chance)
    scenarios.same(scenarios.run_to_the_end(config), reference)
    slowest = max(hit.seconds for hit in hits)
    return [f"{len(hits)} hang-ups, slowest end {slowest:.1f} s; then as undisturbed, bit for bit", *map(str, hits)]


def starts(bench: Bench) -> list[str]:
    """Other starts in the folder of a run that goes on."""
    config = write_config(bench.folder / "starts", bench.base, run={"max_steps": 100_000, "epochs": 100_000})
    hits = scenarios.start_again(config, bench.counts.starts)
    return [f"{len(hits)} other starts in one folder, all refused; the first run unharmed", *map(str, hits)]


PARTS: dict[str, Callable[[Bench], list[str]]] = {
    part.__name__: part
    for part in (damage, disk, failures, signals, hang_ups, suspensions, starts, kills, full, exact, ranks)
}


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing new is opened for writing below; `run.lock`, which is open, would keep a plain remount from happening."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def write_report(path: Path, command: str, results: dict[str, tuple[float, list[str]]]) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "peft", "transformers"))
    lines = [
        "# Fault harness, long form",
        "",
        f"`{command}`, {platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores, "
        f"Python {platform.python_version()}, {packages}",
        "",
    ]
    for name, (seconds, rows) in results.items():
        lines += [f"## {name}: {seconds:.0f} s", "", rows[0], "", "```", *rows[1:], "```", ""]
    path.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--full-kills", type=int, default=20)
    parser.add_argument("--signals", type=int, default=10, help="of each of SIGTERM and SIGUSR1")
    parser.add_argument("--failures", type=int, default=5, help="of each of: killed, raising")
    parser.add_argument("--hang-ups", type=int, default=5)
    parser.add_argument("--suspensions", type=int, default=10, help="of 30 s each")
    parser.add_argument("--starts", type=int, default=20, help="in the folder of a run that goes on")
    parser.add_argument("--minutes", type=float, default=60, help="at most for the blows of kills and of signals")
    parser.add_argument("--seed", type=int, default=0)
    counts = parser.parse_args()
    results: dict[str, tuple[float, list[str]]] = {}
    command = f"python -m tests.faults.long_form --seed {counts.seed} --only {' '.join(counts.only)}"
    with tempfile.TemporaryDirectory(prefix="ds_higgs_faults_") as folder:
        base = Path(folder) / "base"
        write_tiny_base(base)
        bench = Bench(Path(folder), base, random.Random(counts.seed), counts)
        for name in counts.only:
            bench.part_started = time.monotonic()
            rows = PARTS[name](bench)
            results[name] = (time.monotonic() - bench.part_started, rows)
            write_report(counts.report, command, results)
            print(f"{name}: {results[name][0]:.0f} s: {rows[0]}", flush=True)


if __name__ == "__main__":
    main()
