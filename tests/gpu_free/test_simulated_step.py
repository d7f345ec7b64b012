"""The training step on a simulated GPU at the released shapes: what it launches, waits for and keeps must not grow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import ROOT

# Measured, as they are: whoever lowers one lowers it here.
KERNELS_PER_LAYER = 134  # forward and backward, torch's own kernels, rank 16, dropout 0.05
WAITS = 0  # in a micro-batch
KEPT_BYTES_PER_LAYER_AND_POSITION = 116_100
FUSED = {"compiled": (93, 98_700), "varlen": (95, 97_100)}  # with torch.compile: the same


def find_problems(
    counts: dict,
    *,
    most_kernels: int = KERNELS_PER_LAYER,
    most_kept: int = KEPT_BYTES_PER_LAYER_AND_POSITION,
) -> list[str]:
    """Why a step is not what it has to be."""
    if "error" in counts:
        return ["error"]
    kernels = counts["forward_kernels_per_layer"] + counts["backward_kernels_per_layer"]
    checks = {
        "kernels": kernels <= most_kernels,
        "kept": counts["kept_bytes_per_layer_and_position"] <= most_kept,
        "waits in layers": counts["waits_per_layer"] == 0 and not counts["backward_waits"],
        "waits": len(counts["waits"]) <= WAITS,
        "cpu": not counts["computed_on_cpu"],
        "attention": set(counts["attention"]) in ({"flash"}, {"varlen"}),
    }
    return [name for name, passed in checks.items() if not passed]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return simulate_steps(tmp_path_factory.mktemp("simulated") / "counts.json", timeout=300)


def simulate_steps(found: Path, *arguments: str, timeout: float) -> dict[str, dict]:
    """What `simulated_steps.py` wrote."""
    script = Path(__file__).with_name("simulated_steps.py")
    subprocess.run([sys.executable, str(script), str(found), *arguments], check=True, cwd=ROOT, timeout=timeout)
    return json.loads(found.read_text())


@pytest.fixture(scope="module")
def counted(simulated) -> dict[str, dict]:
    """What was counted in the whole step and in each that is broken on purpose."""
    return simulated["steps"]


def test_the_estimate_is_within_three_per_cent_of_the_simulated_peak(simulated):
    wrong = {setting: ratio for setting, ratio in simulated["estimates"].items() if abs(ratio - 1) > 0.03}
    assert len(simulated["estimates"]) == 12
    assert not wrong


def test_an_estimate_that_leaves_two_tensors_a_layer_out_is_noticed(simulated):
    assert simulated["estimate of more"] < 0.97


@pytest.mark.slow
def test_the_estimate_is_within_three_per_cent_where_parts_are_trained_whole_beside_lora(tmp_path):
    ratios = simulate_steps(tmp_path / "counts.json", "whole parts", timeout=1500)["estimates"]
    assert len(ratios) == 4
    assert not {setting: ratio for setting, ratio in ratios.items() if abs(ratio - 1) > 0.03}


@pytest.mark.slow
def test_the_estimate_is_within_three_per_cent_in_all_24_settings_of_the_released_model(tmp_path):
    table = tmp_path / "simulated.json"
    command = [sys.executable, "benchmarks/simulate.py", "--output", str(table)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=3000)
    rows = json.loads(table.read_text())["rows"]
    assert len(rows) == 24
    assert not [row for row in rows if abs(row["estimated / simulated"] - 1) > 0.03]


def test_the_step_launches_keeps_and_waits_for_no_more_than_it_did(counted):
    assert not find_problems(counted["whole"]), counted["whole"]


@pytest.mark.parametrize("variant", FUSED)
def test_the_fused_layer_launches_and_keeps_less(simulated, variant: str):
    (kernels, kept), counts = FUSED[variant], simulated["variants"][variant]
    assert not find_problems(counts, most_kernels=kernels, most_kept=kept), counts


def test_attention_in_fp32_writes_no_scores_out(counted):
    assert set(counted["attention in fp32"]["attention"]) == {"efficient"}


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("another kernel", "kernels"),
        ("another tensor kept", "kept"),
        ("a wait in the layers", "waits in layers"),
        ("on the cpu", "cpu"),
        ("on two devices", "error"),
        ("attention with a mask", "attention"),
        ("expanded by the model", "waits"),
    ],
)
def test_a_step_that_is_broken_is_noticed(counted, broken: str, problem: str):
    assert problem in find_problems(counted[broken])
