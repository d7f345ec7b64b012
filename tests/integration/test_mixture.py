"""A run on a mixture: losses of each source, validation manifests by name, and an exact resume."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support import launching


def write_config(folder: Path, base: Path, example: Path, **checkpoint) -> Path:
    """Sources of the example: its training set, its validation set as servers ask for it, and an ending one."""
    train, val = str(example / "train.json"), str(example / "val.json")
    config = {
        "run": {"output_dir": str(folder / "run"), "max_steps": 6},
        "model": {"base": str(base)},
        "lora": {"rank": 2, "dropout": 0.1, "targets": ["attention"]},
        "data": {
            "train": [
                {"manifest": train, "name": "new", "weight": 0.6},
                {"manifest": val, "name": "old", "weight": 0.4, "prompt_form": "boson"},
                {"manifest": val, "weight": 0.2, "epochs": 1},
            ],
            "val": [{"manifest": val, "name": "a", "weight": 3}, {"manifest": train, "name": "b"}],
            "cache_dir": str(folder.parent / "codes"),
            "num_workers": 1,
        },
        "loss": {"keep_base": {"weight": 0.5, "sources": ["old"]}},
        "optim": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 1},
        "zero": {"precision": "bf16"},
        "checkpoint": {"save_steps": 3, **checkpoint},
        "eval": {"eval_steps": 6, "max_batches": 1, "num_audio_samples": 3, "max_audio_s": 0.2, "best_by": "loss"},
        "logging": {"tensorboard": False},
    }
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: Path) -> list[dict]:
    done = launching.run_ranks(2, "-m", "ds_higgs", "train", "-c", config)
    assert done.returncode == 0, done.stdout[-5000:]
    return [json.loads(line) for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()]


def of(event: str, lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def mixed_run(tiny_base, example_dir, tmp_path_factory) -> list[dict]:
    """Of a whole run."""
    folder = tmp_path_factory.mktemp("mixture") / "whole"
    return [{"folder": folder}, *train(write_config(folder, tiny_base, example_dir))]


def test_every_step_tells_what_each_source_gave(mixed_run):
    steps = of("step", mixed_run[1:])
    seen = dict.fromkeys(("new", "old", "val"), 0)
    for line in steps:
        sources = line["sources"]
        assert sum(source["num_samples"] for source in sources.values()) == line["num_samples"] == 4
        for loss, count in (("text_loss", "num_text_targets"), ("audio_loss", "num_audio_targets")):
            assert sum(source[count] for source in sources.values()) == line[count]
            total = sum(source[loss] * source[count] for source in sources.values())
            assert line[loss] == pytest.approx(total / line[count], rel=1e-3)
        for name, source in sources.items():
            assert source["epoch"] >= 1
            seen[name] += source["num_samples"]
    assert seen == {"new": 12, "old": 8, "val": 4}


def test_the_base_is_kept_on_the_sources_that_are_named(mixed_run):
    """The divergence is 0 before the first update, then not; it is in the loss, of the named source alone."""
    steps = of("step", mixed_run[1:])
    for line in steps:
        sources = line["sources"]
        assert {name for name, source in sources.items() if "keep_base_audio" in source} == {"old"} & set(sources)
        kept = [sources.get("old", {}).get(f"keep_base_{stream}", 0.0) for stream in ("text", "audio")]
        assert [line["keep_base_text"], line["keep_base_audio"]] == pytest.approx(kept)
        assert line["loss"] == pytest.approx(line["text_loss"] + line["audio_loss"] + 0.5 * sum(kept))
    assert steps[0]["keep_base_text"] == steps[0]["keep_base_audio"] == 0
    assert max(line["keep_base_audio"] for line in steps) > 0
    assert all("keep_base_text" not in line for line in of("eval", mixed_run[1:]))


def test_validation_manifests_have_names_and_one_value_together(mixed_run):
    first, last = of("eval", mixed_run[1:])
    for line in (first, last):
        a, b = line["sources"]["a"], line["sources"]["b"]
        for loss in ("loss", "text_loss", "audio_loss"):
            assert line[loss] == pytest.approx(0.75 * a[loss] + 0.25 * b[loss])
        assert line["num_audio_targets"] == a["num_audio_targets"] + b["num_audio_targets"]
    assert {line["sample_id"].split(":")[0] for line in of("sample", mixed_run[1:])} == {"val.json", "train.json"}
    assert len({line["number"] for line in of("sample", mixed_run[1:])}) == 3
    best = min((first, last), key=lambda line: line["loss"])
    assert of("best", mixed_run[1:])[-1]["step"] == best["step"]


@pytest.mark.slow
def test_it_goes_on_exactly_where_it_was(mixed_run, tiny_base, example_dir):
    folder = mixed_run[0]["folder"]
    from_here = folder / "run" / "checkpoints" / "step-00000003"
    config = write_config(folder.parent / "resumed", tiny_base, example_dir, resume=str(from_here))
    keys = ("step", "loss", "grad_norm", "sources")
    rest = [[line[key] for key in keys] for line in of("step", train(config))]
    assert rest == [[line[key] for key in keys] for line in of("step", mixed_run[1:])[3:]]
