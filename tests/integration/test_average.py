"""The average of the trained weights: plain torch's, exact on resume, split over any number of ranks."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from ds_higgs.adapters.from_checkpoint import read_trained
from ds_higgs.adapters.opening import open_adapter
from ds_higgs.checkpoint.weights import CheckpointWeights
from tests.faults.job import write_config
from tests.support import launching

WORKER = Path(__file__).with_name("workers") / "average.py"


def run_cases(cases: str, folder: Path, *, stage: int, precision: str, ranks: int) -> None:
    done = launching.run_ranks(ranks, WORKER, cases, folder, str(stage), precision)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "bf16"),
        *(
            pytest.param(stage, precision, marks=pytest.mark.slow)
            for stage, precision in [
                (0, "bf16"),
                (0, "fp32"),
                (1, "fp32"),
                (1, "bf16"),
                (2, "fp32"),
                (3, "bf16"),
                (3, "fp32"),
            ]
        ),
    ],
)
def test_it_is_plain_torchs_and_goes_on_exactly(tmp_path, stage, precision):
    run_cases("it_is_plain_torchs,it_goes_on_exactly", tmp_path, stage=stage, precision=precision, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "other_ranks"),
    [(stage, *ranks) for stage in (0, 1, 2, 3) for ranks in [(2, 1), (1, 2), (2, 3)]],
)
def test_another_number_of_ranks_keeps_it(tmp_path, stage, ranks, other_ranks):
    run_cases("it_is_saved", tmp_path, stage=stage, precision="bf16", ranks=ranks)
    run_cases("it_is_the_sources", tmp_path, stage=stage, precision="bf16", ranks=other_ranks)


@pytest.mark.parametrize(
    ("mode", "ranks", "stage", "in_background"),
    [
        ("lora", 1, 2, True),
        *(pytest.param("full", 2, stage, True, marks=pytest.mark.slow) for stage in (0, 1, 2, 3)),
        *(pytest.param("full", 2, stage, False, marks=pytest.mark.slow) for stage in (0, 3)),
    ],
)
def test_a_run_hands_it_out(tmp_path, tiny_base, mode, ranks, stage, in_background):
    """In each adapter of a step, from the model or by a thread from the checkpoint's files; and as the best."""
    config = write_config(
        tmp_path,
        tiny_base,
        run={"max_steps": 2},
        train={"mode": mode},
        lora={"rank": 16, "dropout": 0.05},
        data={"num_workers": 0},
        optim={"ema_decay": 0.9, "warmup_steps": 0},
        zero={"stage": stage},
        checkpoint={"save_steps": 2, "async": in_background},
        eval={"eval_steps": 2, "weights": "ema", "best_by": "loss"},
    )
    done = launching.run_ranks(ranks, "-m", "ds_higgs", "train", "-c", config)
    assert done.returncode == 0, done.stdout[-6000:]
    adapters, checkpoint = tmp_path / "run" / "adapters", tmp_path / "run" / "checkpoints" / "step-00000002"
    averaged = read_adapter(adapters / "final" / "ema")
    marker = CheckpointWeights.open(checkpoint).marker
    in_checkpoint = read_trained(CheckpointWeights(checkpoint, marker, averaged=True))
    assert len(averaged) == len(in_checkpoint)
    for name, weight in in_checkpoint.items():
        short = name.removeprefix("peft_model.").replace(".default", "")
        assert averaged[short].equal(weight), name
    trained, best = read_adapter(adapters / "step-00000002"), read_adapter(adapters / "best")
    assert any(not weight.equal(trained[name]) for name, weight in averaged.items())
    assert all(weight.equal(best[name]) for name, weight in averaged.items())
    with open_adapter(adapters / "final" / "ema") as found:
        assert found.record is not None
        assert found.record.step == 2


def read_adapter(folder: Path) -> dict:
    [file] = folder.glob("*.safetensors")
    return load_file(file)
