"""Tuning: what is tried, in which order, what a failed trial changes, and going on after a stop."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from ds_higgs.commands import tune_trial
from ds_higgs.commands.tune import Tuner, apply_changes, batch_axis, write_report
from ds_higgs.commands.tune_trial import TrialResult, read_metrics, run_trial
from ds_higgs.config import Config, EvalConfig
from ds_higgs.config.file import load_config
from ds_higgs.training.zero import MONITOR_KEYS, build_deepspeed_config
from tests.support.launching import ROOT


def make_config(**sections) -> Config:
    values = {"run": {"output_dir": "out"}, "model": {"base": "base"}, "data": {"train_manifest": "m", "batch_size": 2}}
    return Config.model_validate({**values, **sections})


class Machine:
    """Stands in for trials: throughput rises with the batch up to 8, stage 1 is best, 16 samples need recomputing."""

    def __init__(self):
        self.tried: list[Config] = []

    def run(self, config: Config, folder: Path) -> TrialResult:
        self.tried.append(config)
        if config.data.batch_size > 8 and config.memory.activation_checkpointing != "full":
            return TrialResult("out of memory")
        speed = 100.0 * min(config.data.batch_size, 16)
        speed *= {"none": 1.0, 2: 0.9, "full": 0.8, "auto": 0.8}[config.memory.activation_checkpointing]
        speed *= {0: 0.9, 1: 1.2, 2: 1.0, 3: 0.5}[config.zero.stage]
        return TrialResult("ok", tokens_per_second=speed, step_time_s=1.0, peak_memory_gib=2.0)


def make_tuner(folder: Path, machine: Machine, **changes) -> Tuner:
    settings = {
        "config": make_config(),
        "folder": folder,
        "run": machine.run,
        "fits": lambda config: config.data.batch_size <= 32,
        "num_processes": 1,
        "steps": 3,
        "max_trials": 100,
    }
    return Tuner(**{**settings, **changes})


def test_the_best_settings_are_found_past_failed_trials(tmp_path: Path):
    machine = Machine()
    tuner = make_tuner(tmp_path, machine)
    best = tuner.search()
    assert best["data.batch_size"] == 16
    assert best["memory.activation_checkpointing"] == "full"
    assert best["zero.stage"] == 1
    assert any(result.status == "out of memory" for result in tuner.results.values())
    assert max(config.data.batch_size for config in machine.tried) <= 32


def test_what_the_estimate_refuses_is_not_run(tmp_path: Path):
    machine = Machine()
    tuner = make_tuner(tmp_path, machine, fits=lambda config: config.data.batch_size <= 4)
    tuner.search()
    assert {config.data.batch_size for config in machine.tried} == {1, 2, 4}
    assert any(result.status == "does not fit" for result in tuner.results.values())


def test_recomputing_is_tried_only_where_memory_runs_out(tmp_path: Path):
    class Large(Machine):
        def run(self, config: Config, folder: Path) -> TrialResult:
            self.tried.append(config)
            return TrialResult("ok", tokens_per_second=100.0)

    machine = Large()
    tuner = make_tuner(tmp_path, machine)
    tuner._improve({}, batch_axis)
    recomputing = [config for config in machine.tried if config.memory.activation_checkpointing not in ("none", "auto")]
    assert len(recomputing) == 1


@pytest.mark.parametrize("sizes", [{"optim": {"global_batch_size": 16}}, {"data": {"max_tokens": "auto"}}])
def test_sizes_that_are_left_to_the_estimate_stay_so(tmp_path: Path, sizes):
    machine = Machine()
    data = {"train_manifest": "m", "batch_size": 2, **sizes.get("data", {})}
    config = make_config(**{**sizes, "data": data})
    tuner = make_tuner(tmp_path, machine, config=config)
    best = tuner.search()
    assert best == {"memory.activation_checkpointing": "none", "zero.stage": 1}
    assert {one.memory.activation_checkpointing for one in machine.tried} == {"auto", "none", 2, "full"}
    for trial in [*machine.tried, apply_changes(config, best)]:
        assert trial.optim.global_batch_size == config.optim.global_batch_size
        assert (trial.data.batch_size, trial.data.max_tokens) == (config.data.batch_size, config.data.max_tokens)
        assert trial.optim.gradient_accumulation_steps == 1


def test_nothing_is_tried_twice(tmp_path: Path):
    machine = Machine()
    make_tuner(tmp_path, machine).search()
    tried = [config.model_dump_json(exclude={"run"}) for config in machine.tried]
    assert len(set(tried)) == len(tried)


def test_trials_are_short_and_touch_nothing_of_the_run(tmp_path: Path):
    config = make_tuner(tmp_path, Machine()).trial_config({"zero.stage": 3})
    assert config.run.max_steps == 3 + 2
    assert config.run.output_dir.is_relative_to(tmp_path / "trials")
    assert (config.zero.stage, config.data.val_manifest, config.checkpoint.resume) == (3, None, "never")


def test_trials_neither_validate_nor_track(tmp_path: Path):
    """Whatever the configuration watches: a tracker that stayed on would get dozens of runs of eight steps."""
    config = make_config(
        data={"train_manifest": "m", "val_manifest": "v"},
        eval={"best_by": "stop_rate", "patience": 3, "num_audio_samples": 2, "audio_every": 5},
        logging={"tensorboard": True, "wandb": "project", "comet": "project", "csv": True},
        zero={"extra": {"comet": {"enabled": True}, "prescale_gradients": True}},
    )
    trial = make_tuner(tmp_path, Machine(), config=config).trial_config({})
    assert trial.eval == EvalConfig()
    given = build_deepspeed_config(trial)
    assert not MONITOR_KEYS & set(given)
    assert given["prescale_gradients"] is True


def test_the_example_can_be_tuned(tmp_path: Path):
    example = load_config(ROOT / "examples" / "voice_cloning" / "config.yaml", {})
    config = make_tuner(tmp_path, Machine(), config=example).trial_config({"zero.stage": 1})
    assert (config.zero.stage, config.eval.num_audio_samples, config.data.val_manifest) == (1, 0, None)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 16), (4, 4), (16, 1), (64, 1)])
def test_the_global_batch_is_kept(batch_size: int, accumulation: int):
    config = make_config(optim={"gradient_accumulation_steps": 8})
    changed = apply_changes(config, {"data.batch_size": batch_size})
    assert changed.optim.gradient_accumulation_steps == accumulation


def test_a_stopped_tuning_goes_on_where_it_was(tmp_path: Path):
    first = Machine()
    make_tuner(tmp_path, first, max_trials=4).search()
    assert len(first.tried) == 4
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"status": "ok"}\n[]\n{"changes": {}, "speed": 3}\n\x00\n')  # damaged
        file.write('{"changes": {"zero.st')  # killed while writing
    second, whole = Machine(), Machine()
    tuner = make_tuner(tmp_path, second)
    tuner.load_results()
    (tmp_path / "fresh").mkdir()
    assert tuner.search() == make_tuner(tmp_path / "fresh", whole).search()
    assert len(second.tried) == len(whole.tried) - 4
    assert all(json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines())


def test_settings_that_the_config_refuses_are_noted(tmp_path: Path):
    tuner = make_tuner(tmp_path, Machine())
    assert tuner.throughput({"zero.stage": 7}) == 0
    assert [result.status for result in tuner.results.values()] == ["refused"]


def test_the_report_holds_every_trial_and_a_config_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture):
    tuner = make_tuner(tmp_path, Machine())
    best = tuner.search()
    write_report(tuner, best)
    written = json.loads((tmp_path / "tune.json").read_text())
    assert written["best"] == best
    assert len(written["trials"]) == len(tuner.results)
    config = Config.model_validate(yaml.safe_load((tmp_path / "best.yaml").read_text()))
    assert (config.zero.stage, config.data.batch_size) == (1, 16)
    assert config.run.output_dir == tuner.config.run.output_dir.resolve()
    assert "out of memory" in capsys.readouterr().out


def test_warm_up_steps_do_not_count():
    steps = [{"tokens_per_second": speed, "step_time_s": 1 / speed, "peak_memory_gib": speed} for speed in (1, 9, 5, 7)]
    result = read_metrics(steps, warmup_steps=1)
    assert (result.tokens_per_second, result.peak_memory_gib) == (7, 9)
    assert read_metrics(steps, warmup_steps=4).status == "failed"


SCRIPTS = {
    "out of memory": "raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')",
    "failed": "import sys; print('ds-higgs: zero.stage: no such stage'); sys.exit(2)",
    "timeout": "import time; time.sleep(60)",
}


@pytest.mark.parametrize("status", SCRIPTS)
def test_a_trial_that_dies_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str):
    real_popen = tune_trial.subprocess.Popen
    monkeypatch.setattr(
        tune_trial.subprocess, "Popen", lambda command, **kw: real_popen([sys.executable, "-c", SCRIPTS[status]], **kw)
    )
    timeout_s = 1.0 if status == "timeout" else 60.0
    result = run_trial(make_config(), tmp_path / "trial", num_processes=1, warmup_steps=1, timeout_s=timeout_s)
    assert result.status == status
    assert status != "failed" or "no such stage" in result.detail
