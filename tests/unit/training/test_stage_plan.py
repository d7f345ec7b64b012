"""zero.stage: auto, for cards of given sizes at the released shapes."""

import pytest

from ds_higgs.checkpoint import saved_stage
from ds_higgs.config import Config
from ds_higgs.hub import RELEASED_REPOSITORY
from ds_higgs.job import distributed
from ds_higgs.job.distributed import Ranks
from ds_higgs.sizing.memory import GIB
from ds_higgs.training.stage_plan import choose_stage, decide_stage


def config_of(mode: str, stage: int | str = "auto") -> Config:
    values = {"run": {"output_dir": "out"}, "model": {"base": RELEASED_REPOSITORY}, "data": {"train_manifest": "m"}}
    return Config.model_validate({**values, "train": {"mode": mode}, "zero": {"stage": stage}})


@pytest.mark.parametrize(
    ("mode", "world_size", "card_gib", "stage", "fits"),
    [
        ("lora", 8, 24, 2, True),
        ("audio_path", 8, 80, 2, True),
        ("audio_path", 8, 16, 3, True),
        ("full", 8, 141, 2, True),
        ("full", 8, 80, 2, True),
        ("full", 8, 32, 3, True),
        ("full", 8, 16, 3, False),
        ("full", 64, 24, 3, True),
    ],
)
def test_the_first_stage_that_fits(mode, world_size, card_gib, stage, fits):
    found = choose_stage(config_of(mode), positions=500, world_size=world_size, memory_bytes=card_gib * GIB)
    assert found == (stage, fits)


def test_a_run_takes_the_stage_of_its_checkpoint_then_that_of_the_smallest_card(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "memory_bytes", lambda device: 32 * GIB)

    def decide(config: Config, ranks: int = 8, **options) -> int | str:
        options = {"may_split_weights": True, "saved": None, **options}
        return decide_stage(config, longest=500, ranks=Ranks(0, ranks, 0), **options).zero.stage

    assert decide(config_of("full")) == 3
    assert decide(config_of("full"), saved=1) == 1
    assert decide(config_of("full"), may_split_weights=False) == decide(config_of("full"), ranks=1) == 2
    assert decide(config_of("full", stage=0)) == 0
    assert saved_stage(tmp_path, resume="auto") is None
