"""Checkpoints of real DeepSpeed engines: exact resume, strict loading, failed writes, another number of ranks."""

from pathlib import Path

import pytest

from tests.support import launching

WORKER = Path(__file__).with_name("workers") / "checkpoint.py"
CASES = (
    "resume_is_exact",
    "a_save_in_the_background_is_of_its_step",
    "frozen_weights_are_left_out",
    "config_wins",
    "other_shapes_are_refused",
    "code_in_a_file_is_refused",
    "one_ranks_full_disk_is_told_to_all",
)


def run_cases(cases: tuple[str, ...], folder: Path, *, stage: int, precision: str, ranks: int) -> None:
    done = launching.run_ranks(ranks, WORKER, ",".join(cases), folder, str(stage), precision)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_two_ranks(tmp_path, stage, precision):
    cases = CASES if stage else CASES[:-1]  # stage 0 writes no shards
    run_cases(cases, tmp_path, stage=stage, precision=precision, ranks=2)


@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "other_ranks"),
    [
        (2, "bf16", 2, 3),
        (3, "bf16", 2, 1),
        *(
            pytest.param(stage, precision, *ranks, marks=pytest.mark.slow)
            for stage, precision in [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
            for ranks in [(2, 1), (1, 2), (2, 3), (3, 2)]
        ),
    ],
)
def test_another_number_of_ranks_keeps_masters_and_moments(tmp_path, stage, precision, ranks, other_ranks):
    run_cases(("whole_state_is_saved",), tmp_path, stage=stage, precision=precision, ranks=ranks)
    run_cases(("whole_state_is_the_sources",), tmp_path, stage=stage, precision=precision, ranks=other_ranks)
