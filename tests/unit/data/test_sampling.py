"""The plan of an epoch and how it is dealt: properties over lengths, batch settings, ranks, and changes of ranks."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_higgs.batch import Batch, Labels, ModelInputs
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.sampling import draw_half, padding_share, plan_epoch, round_up

EXAMPLES = int(os.environ.get("DS_HIGGS_EXAMPLES", "60"))
MAX_TOKENS = 2000

lengths_of_samples = st.lists(st.integers(1, MAX_TOKENS // 8), min_size=1, max_size=80).map(
    lambda values: np.asarray(values, dtype=np.int32) * 8
)
batching = st.one_of(
    st.integers(1, 9).map(lambda size: {"batch_size": size}),
    st.integers(MAX_TOKENS, 4 * MAX_TOKENS).map(lambda tokens: {"max_tokens": tokens}),
)
seeds = st.integers(0, 2**31)


@dataclass
class NumberedSamples:
    """Stands in for a data set whose sample i is the number i."""

    lengths: np.ndarray
    filler_index: int = 0
    redraws: bool = False

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return index

    def sample_id(self, index):
        return str(index)

    def in_epoch(self, epoch, *, seed):
        return self


def number_collator(samples, sample_ids):
    labels = Labels(torch.zeros(1, 1, dtype=torch.long), torch.zeros(8, 0, dtype=torch.long))
    return Batch(ModelInputs(), labels, tuple(sample_ids), num_tokens=len(samples))


def make_loaders(lengths, world_size, accumulation, **settings):
    return [
        StepLoader(
            EpochOrder(NumberedSamples(lengths), **settings),
            number_collator,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            world_size=world_size,
            whole_steps=settings.get("whole_steps", False),
        )
        for rank in range(world_size)
    ]


def next_steps(loaders, count=None):
    """The ids of the next steps of all ranks, [step][rank][slot]; None is all that is left of the epoch."""
    iterators = [iter(loader) for loader in loaders]
    steps = []
    while count is None or len(steps) < count:
        step = [next(iterator, None) for iterator in iterators]
        if step[0] is None:
            assert all(part is None for part in step), "ranks must make the same number of steps"
            break
        steps.append([[batch.sample_ids for batch in slots] for slots in step])
    return steps


def ids_in(steps):
    return [int(name) for step in steps for rank in step for slot in rank for name in slot]


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths_of_samples, batching, seeds, st.integers(0, 3), st.booleans())
def test_a_plan_holds_every_sample_once_within_its_limits(lengths, limits, seed, epoch, shuffle):
    plan = plan_epoch(lengths, seed=seed, epoch=epoch, shuffle=shuffle, **limits)
    assert sorted(plan.samples.tolist()) == list(range(len(lengths)))
    batches = [plan[number].tolist() for number in range(len(plan))]
    assert [sample for batch in batches for sample in batch] == plan.samples.tolist()
    assert all(batches)
    if "batch_size" in limits:
        assert max(map(len, batches)) <= limits["batch_size"]
        assert len(batches) == -(-len(lengths) // limits["batch_size"])
    else:
        padded = round_up(lengths)
        assert max(len(batch) * padded[batch].max() for batch in batches) <= limits["max_tokens"]
    if not shuffle:
        assert plan.samples.tolist() == list(range(len(lengths)))


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths_of_samples, batching, seeds)
def test_a_plan_is_a_function_of_seed_and_epoch(lengths, limits, seed):
    first, again = (plan_epoch(lengths, seed=seed, epoch=1, **limits) for _ in range(2))
    np.testing.assert_array_equal(first.samples, again.samples)
    np.testing.assert_array_equal(first.ends, again.ends)


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths_of_samples, batching, seeds, st.integers(1, 8), st.integers(1, 4))
def test_an_epoch_covers_every_sample_once_on_any_ranks(lengths, limits, seed, world_size, accumulation):
    loaders = make_loaders(lengths, world_size, accumulation, seed=seed, **limits)
    steps = next_steps(loaders)
    assert sorted(ids_in(steps)) == list(range(len(lengths)))
    assert len(steps) == loaders[0].steps_in_epoch(0)
    assert all(len(rank) == accumulation for step in steps for rank in step)
    for step in steps[:-1]:
        assert all(slot for rank in step for slot in rank), "fillers belong to the last step alone"
    assert {loader.epoch for loader in loaders} == {1}


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths_of_samples,
    batching,
    seeds,
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=5),
)
def test_stopping_and_going_on_with_other_ranks_sees_the_rest_of_the_epoch(lengths, limits, seed, stages):
    """Each stage: so many ranks, with so much accumulation, make so many steps; then the run stops."""
    state, seen, order = None, [], []
    for world_size, accumulation, count in [*stages, (1, 1, None)]:
        loaders = make_loaders(lengths, world_size, accumulation, seed=seed, **limits)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        if loaders[0].epoch > 0:
            break
        steps = next_steps(loaders, count)
        seen += ids_in(steps)
        # The order in which the plan is consumed: slots before ranks before steps.
        order += [name for step in steps for slot in zip(*step, strict=True) for rank in slot for name in rank]
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert sorted(seen) == list(range(len(lengths)))
    assert order == [str(sample) for sample in plan_epoch(lengths, seed=seed, epoch=0, **limits).samples]


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths_of_samples, batching, seeds, st.integers(1, 8), st.integers(0, 30))
def test_a_resumed_run_makes_the_very_steps_that_were_left(lengths, limits, seed, world_size, done):
    whole = make_loaders(lengths, world_size, 2, seed=seed, **limits)
    expected = next_steps(whole) + next_steps(whole)
    done = min(done, len(expected) - 1)
    stopped = make_loaders(lengths, world_size, 2, seed=seed, **limits)
    first = next_steps(stopped, min(done, stopped[0].steps_in_epoch(0)))
    if done > len(first):
        next_steps(stopped)  # to the epoch's end, where it turns
        first += next_steps(stopped, done - len(first))
    resumed = make_loaders(lengths, world_size, 2, seed=seed, **limits)
    for loader in resumed:
        loader.load_state_dict(stopped[0].state_dict())
    rest = next_steps(resumed)
    if resumed[0].epoch == 1:
        rest += next_steps(resumed)
    assert first + rest == expected


def log_normal_lengths(count, seed=0):
    """Expanded lengths of samples of 2 to 30 s, log-normal about 7 s, at 25 frames a second."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(rng.lognormal(np.log(7), 0.6, count), 2, 30)
    return (100 + 25 * seconds).astype(np.int32)


@pytest.mark.parametrize("epoch", [0, 1])
def test_padding_is_small_by_token_budget(epoch):
    lengths = log_normal_lengths(5000)
    plan = plan_epoch(lengths, seed=0, epoch=epoch, max_tokens=8000)
    rng = np.random.default_rng(0)
    random_plan = plan_epoch(lengths[rng.permutation(5000)], seed=0, epoch=epoch, batch_size=16, shuffle=False)
    assert padding_share(plan, lengths) < 0.06
    assert padding_share(random_plan, lengths[np.random.default_rng(0).permutation(5000)]) > 0.2


def test_small_data_sets_too_meet_other_neighbours_in_each_epoch():
    lengths = log_normal_lengths(24)
    neighbours = [
        {frozenset(plan[number].tolist()) for number in range(len(plan))}
        for plan in (plan_epoch(lengths, seed=0, epoch=epoch, batch_size=2) for epoch in range(2))
    ]
    assert len(neighbours[0] & neighbours[1]) < 6


def test_the_order_of_lengths_is_random_over_an_epoch():
    """No curriculum: long batches come early and late."""
    lengths = log_normal_lengths(4000)
    plan = plan_epoch(lengths, seed=0, epoch=0, max_tokens=8000)
    means = np.asarray([lengths[plan[number]].mean() for number in range(len(plan))])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.1


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths_of_samples, st.integers(1, 20), seeds, st.integers(1, 8), st.integers(1, 4))
def test_whole_steps_have_the_same_samples_on_any_ranks(lengths, size, seed, world_size, accumulation):
    limits = {"batch_size": size, "seed": seed, "whole_steps": True}
    plain = [sorted(ids_in([step])) for step in next_steps(make_loaders(lengths, 1, 1, **limits))]
    assert sorted(number for step in plain for number in step) == list(range(len(lengths)))
    assert [len(step) for step in plain[:-1]] == [size] * (len(plain) - 1)
    steps = next_steps(make_loaders(lengths, world_size, accumulation, **limits))
    assert [sorted(ids_in([step])) for step in steps] == plain
    for step in steps:
        sizes = [len(slot) for rank in step for slot in rank]
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == world_size * accumulation


def test_whole_steps_are_of_all_lengths_in_parts_of_one_length_each():
    lengths = np.arange(1, 401, dtype=np.int32) * 8
    plan = plan_epoch(lengths, seed=0, epoch=0, batch_size=100, whole_steps=True)
    for number in range(len(plan)):
        step = lengths[plan[number]]
        assert step.max() - step.min() > 3000
        assert (np.diff(step) >= 0).all()


def test_going_on_inside_an_epoch_of_whole_steps_on_other_ranks():
    lengths = np.arange(1, 41, dtype=np.int32) * 8
    whole = next_steps(make_loaders(lengths, 1, 2, batch_size=6, whole_steps=True))
    loaders = make_loaders(lengths, 2, 1, batch_size=6, whole_steps=True)
    first = next_steps(loaders, count=2)
    others = make_loaders(lengths, 3, 1, batch_size=6, whole_steps=True)
    for loader in others:
        loader.load_state_dict(loaders[0].state_dict())
    steps = [*first, *next_steps(others)]
    assert [sorted(ids_in([step])) for step in steps] == [sorted(ids_in([step])) for step in whole]


@given(st.lists(st.booleans(), max_size=80).map(np.asarray), seeds, st.integers(0, 50))
@settings(max_examples=EXAMPLES, deadline=None)
def test_half_of_the_eligible_samples_are_drawn_to_one(eligible: np.ndarray, seed: int, epoch: int):
    eligible = eligible.astype(np.bool_)
    drawn = draw_half(eligible, seed=seed, epoch=epoch)
    assert not (drawn & ~eligible).any()
    assert 0 <= int((eligible & ~drawn).sum()) - int(drawn.sum()) <= 1
    assert np.array_equal(drawn, draw_half(eligible, seed=seed, epoch=epoch))


def test_every_epoch_draws_another_half_and_none_is_left_out_for_ever():
    eligible = np.ones(40, dtype=np.bool_)
    halves = [draw_half(eligible, seed=1, epoch=epoch) for epoch in range(20)]
    assert len({half.tobytes() for half in halves}) == 20
    assert np.any(halves, axis=0).all()
    assert not np.all(halves, axis=0).any()
