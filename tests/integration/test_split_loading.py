"""ZeRO-3 loads a base split: no rank holds all of it, and it is the base, to the bit, and learns the same."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ds_higgs.model.tiny import write_tiny_base
from tests.support import launching
from tests.support.runs import write_adapter, write_whole_weights

WORKER = Path(__file__).with_name("workers") / "split_loading.py"


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory) -> Path:
    """Of which no weight is a large part."""
    folder = tmp_path_factory.mktemp("deep") / "base"
    write_tiny_base(folder, num_layers=12, intermediate_size=512)
    return folder


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "base"
    write_tiny_base(folder, hidden_size=64, num_layers=2, intermediate_size=96)
    return folder


def run(base: Path, *cases: str, starts: Sequence[Path] = ()) -> None:
    done = launching.run_ranks(2, WORKER, ",".join(cases), base, *starts)
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_rank_never_holds_more_than_its_share_and_one_weight(deep_base):
    run(deep_base, "a_rank_holds_its_share_and_one_weight")


def test_a_split_base_is_the_base_and_learns_what_a_whole_one_does(small_base):
    run(
        small_base,
        "full_has_the_bases_weights",
        "lora_has_the_bases_weights",
        "full_learns_the_same",
        "lora_learns_the_same",
    )


def test_a_split_base_takes_what_a_run_starts_from(small_base, tmp_path):
    write_adapter(small_base, tmp_path / "adapter", seed=1)
    write_whole_weights(small_base, tmp_path / "weights", mode="full")
    starts = [tmp_path / "adapter", tmp_path / "weights"]
    run(small_base, "a_warm_start_has_the_sources_weights", starts=starts)
