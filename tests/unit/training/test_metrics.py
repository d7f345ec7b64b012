"""metrics.jsonl: what is written, and what is left of it when a run goes on from an earlier step."""

import json
import math

from ds_higgs.training.metrics import MetricsFile


def read(path):
    return [(line["event"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]


def test_rewinding_drops_what_came_after_the_step(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", enabled=True)
    written = [("step", 1), ("step", 2), ("eval", 2), ("checkpoint", 2), ("step", 3), ("eval", 3), ("step", 4)]
    for event, step in written:
        metrics.write(event, step=step, loss=1.0)

    metrics.rewind(2)
    assert read(metrics.path) == written[:4]

    metrics.write("step", step=3, loss=2.0)
    assert read(metrics.path) == [*written[:4], ("step", 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewinding_drops_the_end_of_the_run_before(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", enabled=True)
    metrics.write("step", step=2)
    metrics.write("end", step=2)
    metrics.rewind(2)
    assert read(metrics.path) == [("step", 2)]


def test_rewinding_drops_a_line_that_a_kill_cut_off(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", enabled=True)
    metrics.write("step", step=1)
    with metrics.path.open("a") as file:
        file.write('{"event": "step", "st')
    metrics.rewind(5)
    assert read(metrics.path) == [("step", 1)]


def test_only_the_main_rank_touches_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    other = MetricsFile(path, enabled=False)
    other.write("step", step=1)
    other.rewind(0)
    assert not path.exists()
    MetricsFile(path, enabled=True).write("step", step=1)
    other.rewind(0)
    assert read(path) == [("step", 1)]


def test_numbers_that_are_not_finite_are_text(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", enabled=True)
    metrics.write("step", step=1, loss=math.nan, nested={"list": [math.inf, 1.5]})
    line = json.loads(metrics.path.read_text())
    assert line == {"event": "step", "step": 1, "loss": "nan", "nested": {"list": ["inf", 1.5]}}
