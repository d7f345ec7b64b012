"""A run's folder: which adapters it still stands for, which go, and what damage in its small files does."""

import json
from pathlib import Path

import pytest

from ds_higgs.config import Config
from ds_higgs.errors import UserError
from ds_higgs.run_folder import RunFolder, step_of
from ds_higgs.training.metrics import MetricsFile


def make_config(folder: Path) -> Config:
    values = {"run": {"output_dir": folder}, "model": {"base": "base"}, "data": {"train_manifest": "train.json"}}
    return Config.model_validate(values)


def make_run(folder: Path, **adapters: int | None) -> RunFolder:
    """Adapters by name with the step that they record; None: no record."""
    for name, step in adapters.items():
        path = folder / "adapters" / name.replace("_", "-")
        path.mkdir(parents=True)
        if step is not None:
            record = {"step": step, "seed": 0, "samples": 1, "audio_targets": 1, "losses": {}, "config": {}}
            (path / "training.json").write_text(json.dumps({**record, "losses_are_of": "training"}))
    return RunFolder(folder)


def adapters(run: RunFolder) -> set[str]:
    return {path.name for path in run.adapters.iterdir() if path.name != "superseded"}


def aside(run: RunFolder) -> set[str]:
    return {path.name for path in run.adapters.glob("superseded/*")}


ALL = {"step_00000005": 5, "step_00000010": 10, "final": 10, "best": 5}


def test_a_run_that_starts_anew_keeps_no_adapter_of_the_earlier_one(tmp_path):
    run = make_run(tmp_path, **ALL)
    run.set_adapters_aside(reached=-1, finished=False, best_step=None)
    assert adapters(run) == set()
    assert aside(run) == {"step-00000005-1", "step-00000010-1", "final-1", "best-1"}


def test_an_extended_run_has_no_final_adapter_any_more(tmp_path):
    run = make_run(tmp_path, **ALL)
    run.set_adapters_aside(reached=10, finished=False, best_step=5)
    assert adapters(run) == {"step-00000005", "step-00000010", "best"}
    assert aside(run) == {"final-1"}


def test_going_back_moves_the_future_aside(tmp_path):
    run = make_run(tmp_path, **{**ALL, "best": 10})
    run.set_adapters_aside(reached=5, finished=False, best_step=5)
    assert adapters(run) == {"step-00000005"}


@pytest.mark.parametrize("recorded", [True, False])
def test_a_finished_run_started_again_keeps_all(tmp_path, recorded):
    run = make_run(tmp_path, **{name: step if recorded else None for name, step in ALL.items()})
    run.set_adapters_aside(reached=10, finished=True, best_step=5)
    assert (adapters(run), aside(run)) == ({"step-00000005", "step-00000010", "final", "best"}, set())


def test_nothing_on_the_shelf_is_overwritten(tmp_path):
    for _ in range(2):
        make_run(tmp_path, final=3).set_adapters_aside(reached=-1, finished=False, best_step=None)
    assert aside(RunFolder(tmp_path)) == {"final-1", "final-2"}


def test_an_adapter_that_was_being_replaced_when_the_run_was_killed_comes_back(tmp_path):
    run = make_run(tmp_path, best=5, final=10)
    (run.adapters / "best").rename(run.adapters / ".replaced-best")
    (run.adapters / ".partial-best").mkdir()
    run.set_adapters_aside(reached=10, finished=True, best_step=5)
    assert adapters(run) == {"best", "final"}


def test_pruning_leaves_the_newest_and_never_touches_final_and_best(tmp_path):
    steps = {f"step_{step:08d}": step for step in (2, 4, 6, 10, 100)}
    run = make_run(tmp_path, **steps, final=2, best=4)
    run.prune_adapters(keep=None)
    assert len(adapters(run)) == 7
    run.prune_adapters(keep=2)
    assert adapters(run) == {"step-00000010", "step-00000100", "final", "best"}
    run.prune_adapters(keep=3)
    assert len(adapters(run)) == 4


def test_the_adapter_of_a_step_is_found_under_any_name(tmp_path):
    run = make_run(tmp_path, step_00000010=10, final=12, best=7)
    assert [run.find_adapter(step).name for step in (7, 10, 12, None)] == ["best", "step-00000010", "final", "final"]
    with pytest.raises(UserError, match="no adapter of step 5; found steps: 7, 10, 12"):
        run.find_adapter(5)


def test_only_names_with_a_step_have_one():
    assert step_of("step-00000500") == 500
    assert [step_of(name) for name in ("final", "step-", "step-x", "step-5-1", "step-٣", "xstep-5")] == [None] * 6


DAMAGE = [
    "{",
    "[1]",
    "null",
    '{"event": "step"}',
    '{"event": 3, "step": 1}',
    '{"event": "step", "step": "x"}',
    "\x00",
    "",
]


def test_damaged_lines_of_the_metrics_are_skipped_with_a_warning(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    good = [
        {"event": "step", "step": 1, "note": "a\u2028b"},
        {"event": "step", "step": 2},
        {"event": "step", "step": 3},
    ]
    lines = [json.dumps(good[0], ensure_ascii=False), *DAMAGE, *map(json.dumps, good[1:])]
    file.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b'{"event": "step", "st')
    assert RunFolder(tmp_path).metrics == good
    assert f"{file}:2" in caplog.text
    MetricsFile(file, enabled=True).rewind(2)
    assert [json.loads(line) for line in file.read_text().split("\n")[:-1]] == good[:2]


def test_what_failed_before_the_run_went_on_is_mended(tmp_path):
    run = RunFolder(tmp_path)
    run.failure_file.write_text("out of memory")
    run.begin(make_config(tmp_path), {"a": 1})
    assert not run.failure_file.exists()
    assert run.mended_failure_file.read_text() == "out of memory"
    assert run.config.run.output_dir == tmp_path
    assert json.loads(run.deepspeed_config_file.read_text()) == {"a": 1}


def test_a_damaged_configuration_is_told_with_its_file(tmp_path):
    run = RunFolder(tmp_path)
    run.begin(make_config(tmp_path), {})
    run.config_file.write_text("run: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        RunFolder(tmp_path).config  # noqa: B018 - the reading is what fails
