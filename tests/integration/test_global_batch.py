"""`optim.global_batch_size`: the same run on one rank and on two."""

import json
from pathlib import Path

import pytest

from tests.faults.job import write_config
from tests.support import launching
from tests.support.parity import ROUNDING

STEPS = 3


def train(folder: Path, base: Path, ranks: int) -> tuple[list[dict], dict]:
    """The step lines and the DeepSpeed JSON of a run without dropout, which draws other masks on every rank."""
    config = write_config(
        folder,
        base,
        run={"max_steps": STEPS},
        lora={"dropout": 0.0, "rank": 2, "targets": ["attention"]},
        data={"val_manifest": None, "num_workers": 0},
        optim={"global_batch_size": 6, "warmup_steps": 1, "eps": 1e-2},
        zero={"precision": "fp32"},
        checkpoint={"save_steps": 100},
        logging={"profile_steps": 1},
    )
    done = launching.run_ranks(ranks, "-m", "ds_higgs", "train", "-c", config)
    assert done.returncode == 0, done.stdout[-5000:]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    built = json.loads((folder / "run" / "ds_config.json").read_text())
    return [line for line in lines if line["event"] == "step"], built


def test_one_rank_and_two_make_the_same_steps(tmp_path, tiny_base):
    one, built_for_one = train(tmp_path / "one", tiny_base, 1)
    two, built_for_two = train(tmp_path / "two", tiny_base, 2)
    assert built_for_one["train_micro_batch_size_per_gpu"] == 2 * built_for_two["train_micro_batch_size_per_gpu"] == 6
    assert len(one) == len(two) == STEPS
    assert sorted(file.name for file in (tmp_path / "two" / "run" / "profile").iterdir()) == [
        "operations.txt",
        "trace.json.gz",
    ]
    for first, second in zip(one, two, strict=True):
        for count in ("num_samples", "num_tokens", "num_text_targets", "num_audio_targets"):
            assert first[count] == second[count]
        for value in ("loss", "text_loss", "audio_loss", "grad_norm"):
            assert first[value] == pytest.approx(second[value], rel=ROUNDING)
