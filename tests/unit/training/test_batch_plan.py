"""Sizes that are left to the device: the largest that fits, alike on all ranks; the step stays what was asked for."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.distributed import Ranks
from ds_higgs.sizing.estimator import Estimator
from ds_higgs.sizing.inputs import BatchShape
from ds_higgs.sizing.memory import GIB
from ds_higgs.training import batch_plan
from ds_higgs.training.batch_plan import decide_batches, split_step
from ds_higgs.training.memory_plan import build_estimator, build_policy
from ds_higgs.training.zero import build_deepspeed_config

LONGEST = 900
MANY = st.integers(1, 600)


@given(MANY, st.integers(1, 64), MANY, MANY)
def test_a_split_step_holds_all_samples_in_as_few_micro_batches_as_fit(size, world_size, at_once, accumulating):
    accumulating = min(accumulating, at_once)
    batch_size, micro_batches = split_step(size, world_size, at_once=at_once, accumulating=accumulating)
    assert batch_size * micro_batches * world_size >= size
    assert batch_size <= (at_once if micro_batches == 1 else accumulating)
    if micro_batches > 1:
        assert at_once * world_size < size
        assert accumulating * (micro_batches - 1) * world_size < size


@pytest.fixture(scope="module")
def released() -> Estimator:
    return build_estimator(released_config(), world_size=1, cuda=False)


@pytest.fixture(autouse=True)
def counted_once(monkeypatch, released):
    """The released model's parameters are counted once for all tests."""

    def build(config: Config, *, world_size: int, cuda: bool) -> Estimator:
        return replace(released, policy=build_policy(config, released.counts, world_size=world_size, cuda=cuda))

    monkeypatch.setattr(batch_plan, "build_estimator", build)


def released_config(data: dict | None = None, **optim) -> Config:
    values = {
        "run": {"output_dir": "unused"},
        "model": {"base": "bosonai/higgs-audio-v2-generation-3B-base"},
        "data": {"train_manifest": "unused", **(data or {})},
        "optim": optim,
    }
    return Config.model_validate(values)


def decide(monkeypatch, *, gib: float, world_size: int = 1, data: dict | None = None, **optim) -> Config:
    """For the released model on GPUs of `gib`."""
    monkeypatch.setattr(distributed, "memory_bytes", lambda device: int(gib * GIB))
    ranks = Ranks(rank=0, world_size=world_size, local_rank=0)
    return decide_batches(released_config(data, **optim), longest=LONGEST, ranks=ranks)


def test_the_micro_batch_is_the_largest_that_fits(monkeypatch, released):
    config = decide(monkeypatch, gib=80, global_batch_size=500)
    size, micro_batches = config.data.batch_size, config.optim.gradient_accumulation_steps
    policy = build_policy(config, released.counts, world_size=1, cuda=False)
    estimator = replace(released, policy=policy)
    batch, larger = BatchShape.typical(size, LONGEST), BatchShape.typical(-(-500 // (micro_batches - 1)), LONGEST)
    assert estimator.fits(batch, checkpoint_every=None, memory_bytes=80 * GIB)
    assert not estimator.fits(larger, checkpoint_every=None, memory_bytes=80 * GIB)
    built = build_deepspeed_config(config)
    assert built["train_micro_batch_size_per_gpu"] == size
    assert built["gradient_accumulation_steps"] == micro_batches


def test_more_ranks_share_the_same_step(monkeypatch):
    for world_size in (1, 2, 8):
        config = decide(monkeypatch, gib=141, world_size=world_size, global_batch_size=16)
        assert (config.data.batch_size, config.optim.gradient_accumulation_steps) == (16 // world_size, 1)


def test_a_card_that_is_too_small_for_one_sample_tries_it(monkeypatch):
    config = decide(monkeypatch, gib=4, global_batch_size=3)
    assert (config.data.batch_size, config.optim.gradient_accumulation_steps) == (1, 3)


def test_max_tokens_follow_from_the_device_alone(monkeypatch):
    found = [
        decide(monkeypatch, gib=gib, world_size=world_size, data={"max_tokens": "auto"}).data.max_tokens
        for gib, world_size in ((4, 1), (24, 1), (80, 1), (80, 8))
    ]
    assert found[0] == 904  # one sample, as the model pads it
    assert found[0] < found[1] < found[2] == found[3]


def test_numbers_stay_as_they_are(monkeypatch):
    config = decide(monkeypatch, gib=80, gradient_accumulation_steps=3)
    assert (config.data.batch_size, config.optim.gradient_accumulation_steps) == (2, 3)


@pytest.mark.parametrize("gib", [24, 141])
def test_ranks_decide_by_the_smallest_device(monkeypatch, gib):
    told = [str(int(size * GIB)).encode() for size in (141, 24)]
    monkeypatch.setattr(distributed, "gather_bytes", lambda own: told)
    config = decide(monkeypatch, gib=gib, world_size=2, global_batch_size=100)
    monkeypatch.setattr(distributed, "gather_bytes", lambda own: [own])
    assert config == decide(monkeypatch, gib=24, world_size=2, global_batch_size=100)
