"""A stopped run goes on exactly where it was, with every setting that could be in the way, and on other ranks.

The quick forms: tests/integration/test_train.py resumes under the launcher, test_checkpoint_engine.py at all stages.
"""

import pytest

from tests.faults import scenarios

ALL_AT_ONCE = {
    "memory": {"activation_checkpointing": "full"},
    "data": {"num_workers": 2, "batch_size": 2, "max_tokens": 700, "prompt_form": "mixed"},
}


@pytest.mark.parametrize(
    ("stage", "precision", "others"),
    [
        pytest.param(3, "bf16", ALL_AT_ONCE, marks=pytest.mark.slow),
        pytest.param(2, "bf16", ALL_AT_ONCE, marks=pytest.mark.slow),
        pytest.param(1, "bf16", ALL_AT_ONCE, marks=pytest.mark.slow),
        pytest.param(0, "bf16", ALL_AT_ONCE, marks=pytest.mark.slow),
        pytest.param(2, "fp32", {}, marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact(tmp_path, tiny_base, stage, precision, others):
    scenarios.resume_is_exact(tmp_path / "run", tiny_base, zero={"stage": stage, "precision": precision}, **others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "other_ranks", "stage"),
    [(*ranks, stage) for stage in (1, 2, 3) for ranks in [(2, 1), (1, 2), (2, 3)]],
)
def test_another_number_of_ranks_goes_on_as_if_it_had_not_changed(tmp_path, tiny_base, ranks, other_ranks, stage):
    folder = tmp_path / "run"
    difference = scenarios.change_the_number_of_ranks(folder, tiny_base, ranks, other_ranks, stage=stage)
    assert difference < 1e-6
