"""`ds-higgs tune`: short trials over batch, checkpointing and ZeRO settings; a table and the best config.

One setting is varied at a time, in the order that matters most, from the best found so far. What the memory estimate
says cannot fit is not tried. Every result is written at once, so a tuning that was stopped goes on where it was.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds_higgs import setup
from ds_higgs.commands.tune_trial import TrialResult, run_trial
from ds_higgs.config import Config, EvalConfig, LoggingConfig
from ds_higgs.config.file import resolved, validate_config, write_config
from ds_higgs.errors import UserError
from ds_higgs.files import read_json_lines, write_atomically, write_json
from ds_higgs.job import devices, distributed
from ds_higgs.job.answers import print_answer
from ds_higgs.training.batch_plan import fullest_batch, leaves_batches_open
from ds_higgs.training.memory_plan import build_estimator, configured_checkpointing, with_config
from ds_higgs.training.zero import MONITOR_KEYS

logger = logging.getLogger(__name__)

Changes = dict[str, Any]  # "section.key" to value
RunTrial = Callable[[Config, Path], TrialResult]

# A larger batch has to bring this much, or no still larger one is tried.
WORTHWHILE_GAIN = 1.03
BUCKET_SIZES = (20_000_000, 50_000_000, 200_000_000)
WARMUP_STEPS = 2


@dataclass
class Tuner:
    """A search in progress.

    run: makes a trial; fits: whether the estimate lets a config be tried.
    """

    config: Config
    folder: Path
    run: RunTrial
    fits: Callable[[Config], bool]
    num_processes: int
    steps: int
    max_trials: int
    deadline: float = float("inf")
    results: dict[str, TrialResult] = field(default_factory=dict)
    tried: int = 0

    def search(self) -> Changes:
        """The changes to the configuration that gave the most tokens per second."""
        best: Changes = {}
        for axis in AXES:
            best = self._improve(best, axis)
        return best

    def _improve(self, best: Changes, axis: "Axis") -> Changes:
        start = self.throughput(best)
        for series in axis(self, best):
            previous = 0.0
            for changes in series:
                found = self.throughput(changes)
                if found > max(start, 0.0):
                    best, start = changes, found
                if found < WORTHWHILE_GAIN * previous or found == 0:
                    break
                previous = found
        return best

    def is_ok(self, changes: Changes) -> bool:
        """Whether a trial with `changes` was made and ended well."""
        result = self.results.get(_key(changes))
        return result is not None and result.status == "ok"

    def stopped_for_lack_of_gain(self, series: list[Changes]) -> bool:
        """Whether the last trial made of `series` ended well: a still larger batch was not worth trying."""
        made = [changes for changes in series if _key(changes) in self.results]
        return bool(made) and self.is_ok(made[-1])

    def throughput(self, changes: Changes) -> float:
        """Tokens per second of a trial with `changes`; 0 if it failed, does not fit or may not be made any more."""
        key = _key(changes)
        if key not in self.results:
            result = self._try(changes)
            if result is None:
                return 0.0
            self.results[key] = result
            with (self.folder / "trials.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"changes": changes, **asdict(result)}) + "\n")
            logger.info("%s: %s", describe(changes), describe_result(result))
        return self.results[key].tokens_per_second

    def _try(self, changes: Changes) -> TrialResult | None:
        """Make the trial; None where the limit on trials or time is reached."""
        try:
            config = self.trial_config(changes)
        except UserError as error:
            return TrialResult("refused", detail=" ".join(str(error).split()))
        if not self.fits(config):
            return TrialResult("does not fit", detail="by the memory estimate")
        if self.tried >= self.max_trials or time.monotonic() > self.deadline:
            return None
        self.tried += 1
        return self.run(config, self.folder / "trials" / f"{len(self.results):03d}")

    def load_results(self) -> None:
        """Take up the results of a tuning that was stopped."""
        file = self.folder / "trials.jsonl"
        whole = []
        for trial in read_json_lines(file):  # one whose line was cut off by a kill, or damaged, is made again
            try:
                values = dict(trial)
                key = _key(values.pop("changes"))
                self.results[key] = TrialResult(**values)
                whole.append(trial)
            except (KeyError, TypeError):
                logger.warning("%s: a trial without its changes or its result: made again", file)
        write_atomically(file, "".join(json.dumps(trial) + "\n" for trial in whole).encode())

    def trial_config(self, changes: Changes) -> Config:
        """The configuration with `changes`, made short: few steps, no validation, no resuming, no tracker."""
        trial = self.folder / "trials" / f"{len(self.results):03d}"
        short = {
            "run.output_dir": str(trial / "run"),
            "run.max_steps": self.steps + WARMUP_STEPS,
            "run.epochs": 10_000,
            "data.val_manifest": None,
            "data.val": (),
            "checkpoint.resume": "never",
            "zero.extra": {key: value for key, value in self.config.zero.extra.items() if key not in MONITOR_KEYS},
            # Whole sections, so that no key of theirs is forgotten.
            **{f"eval.{key}": value for key, value in EvalConfig().model_dump().items()},
            **{f"logging.{key}": value for key, value in LoggingConfig.silent().model_dump().items()},
        }
        return apply_changes(self.config, {**changes, **short})


def _key(changes: Changes) -> str:
    return json.dumps(changes, sort_keys=True)


def apply_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other values; the global batch is kept as near as the micro-batch lets it."""
    values = resolved(config)
    for key, value in changes.items():
        section, name = key.split(".", 1)
        values[section][name] = value
    for size in ("data.batch_size", "data.max_tokens"):
        before = getattr(config.data, size.removeprefix("data."))
        if size in changes and before:
            micro_batches = config.optim.gradient_accumulation_steps * before / changes[size]
            values["optim"]["gradient_accumulation_steps"] = max(1, round(micro_batches))
    return validate_config(values, source="a trial")


Axis = Callable[[Tuner, Changes], Iterator[list[Changes]]]


def batch_axis(tuner: Tuner, best: Changes) -> Iterator[list[Changes]]:
    """Micro-batches from half the configured size on, doubled; with checkpointing those that do not fit without.

    Where the sizes are left to the estimate, only what is recomputed is varied, and they follow.
    Recomputing costs time at the same size. Where every size fits it is tried once, at the best size, for the table.
    """
    policies: tuple[str | int, ...] = ("none", 2, "full")
    data = tuner.config.data
    if leaves_batches_open(tuner.config):  # the trial takes the largest that fits, as the run will
        yield from ([{**best, "memory.activation_checkpointing": policy}] for policy in policies)
        return
    assert data.max_tokens != "auto"
    key, size = ("data.max_tokens", data.max_tokens) if data.max_tokens else ("data.batch_size", data.batch_size)
    sizes = [size // 2] * (size > 1) + [size * 2**power for power in range(7)]
    for policy in policies:
        series = [{**best, "memory.activation_checkpointing": policy, key: one} for one in sizes]
        yield series
        fitting = [one for one, changes in zip(sizes, series, strict=True) if tuner.is_ok(changes)]
        if len(fitting) == len(sizes) or tuner.stopped_for_lack_of_gain(series):
            largest = max(fitting, key=lambda one: tuner.throughput(series[sizes.index(one)]), default=size)
            yield [{**best, "memory.activation_checkpointing": "full", key: largest}]
            return
        sizes = [one for one in sizes if one not in fitting]


def stage_axis(tuner: Tuner, best: Changes) -> Iterator[list[Changes]]:
    for stage in (0, 1, 2, 3):
        if stage != best.get("zero.stage", tuner.config.zero.stage_number):
            yield [{**best, "zero.stage": stage}]


def overlap_axis(tuner: Tuner, best: Changes) -> Iterator[list[Changes]]:
    yield [{**best, "zero.overlap_comm": not tuner.config.zero.overlap_comm}]


def bucket_axis(tuner: Tuner, best: Changes) -> Iterator[list[Changes]]:
    for size in BUCKET_SIZES:
        if size != tuner.config.zero.reduce_bucket_size:
            yield [{**best, "zero.reduce_bucket_size": size, "zero.allgather_bucket_size": size}]


def offload_axis(tuner: Tuner, best: Changes) -> Iterator[list[Changes]]:
    yield [{**best, "zero.offload_optimizer": not tuner.config.zero.offload_optimizer}]


AXES: tuple[Axis, ...] = (batch_axis, stage_axis, overlap_axis, bucket_axis, offload_axis)


def run_tune(
    config: Config, *, num_processes: int, steps: int, max_trials: int, budget_s: float | None, timeout_s: float
) -> None:
    """Search, and write `tune.json`, `best.yaml` and a table to `run.output_dir`."""
    setup.check_run_folder(config)
    setup.check_code_cache(config.data)
    folder = config.run.output_dir
    folder.mkdir(parents=True, exist_ok=True)

    def run(trial: Config, trial_folder: Path) -> TrialResult:
        return run_trial(
            trial, trial_folder, num_processes=num_processes, warmup_steps=WARMUP_STEPS, timeout_s=timeout_s
        )

    tuner = Tuner(
        config=config,
        folder=folder,
        run=run,
        fits=build_fits(config, num_processes=num_processes),
        num_processes=num_processes,
        steps=steps,
        max_trials=max_trials,
        deadline=time.monotonic() + budget_s if budget_s else float("inf"),
    )
    tuner.load_results()
    tuner.trial_config({})  # a configuration that can make no trial at all is an error of the tuning, not a result
    logger.info("tuning for %d processes; results in %s", num_processes, folder)
    best = tuner.search()
    write_report(tuner, best)


def build_fits(config: Config, *, num_processes: int) -> Callable[[Config], bool]:
    """Whether the estimate says that a config fits this machine's devices, for samples of 500 positions."""
    cuda = devices.uses_cuda()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    memory = distributed.memory_bytes(device) // (1 if cuda else num_processes)
    estimator = build_estimator(config, world_size=num_processes, cuda=cuda)

    def fits(trial: Config) -> bool:
        return with_config(estimator, trial).fits(
            fullest_batch(trial, 500), checkpoint_every=configured_checkpointing(trial), memory_bytes=memory
        )

    return fits


def write_report(tuner: Tuner, best: Changes) -> None:
    trials = [
        {"changes": json.loads(key), **asdict(result)}
        for key, result in sorted(tuner.results.items(), key=lambda item: -item[1].tokens_per_second)
    ]
    write_json(tuner.folder / "tune.json", {"best": best, "trials": trials})
    print_answer(f"\n{'tokens/s':>9}  {'step s':>7}  {'peak GiB':>8}  settings")
    for trial in trials:
        numbers = f"{trial['tokens_per_second']:>9.0f}  {trial['step_time_s']:>7.3f}  {trial['peak_memory_gib']:>8.2f}"
        note = "" if trial["status"] == "ok" else f"  [{trial['status']}] {trial['detail']}"
        print_answer(f"{numbers}  {describe(trial['changes'])}{note}")
    if not any(result.status == "ok" for result in tuner.results.values()):
        print_answer("no trial ended well: the configuration stays as it is")
        return
    write_config(apply_changes(tuner.config, best), tuner.folder / "best.yaml")
    print_answer(f"\nbest: {describe(best)}\nds-higgs train -c {tuner.folder / 'best.yaml'} --run.output_dir DIR")


def describe(changes: Changes) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items()) or "as configured"


def describe_result(result: TrialResult) -> str:
    if result.status != "ok":
        return f"{result.status} {result.detail}".rstrip()
    return f"{result.tokens_per_second:.0f} tokens/s, peak {result.peak_memory_gib:.2f} GiB"
