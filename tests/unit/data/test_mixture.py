"""Mixtures: shares at every moment, epochs of each source, sources that end, and going on with other ranks."""

from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_higgs.data.loader import StepLoader
from ds_higgs.data.mixture import MixedSource, Mixture
from ds_higgs.errors import UserError

from .test_sampling import EXAMPLES, MAX_TOKENS, NumberedSamples, batching, number_collator

weights_of_sources = st.lists(st.integers(1, 1000).map(lambda weight: Fraction(weight, 1000)), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def make_mixture(weights, *, sizes=None, passes=None, seed=0, **limits):
    """Sources of seeded lengths, without an end unless `passes` says so."""
    rng = np.random.default_rng([seed, len(weights)])
    sizes = sizes or rng.integers(1, 60, len(weights)).tolist()
    lengths = [rng.integers(1, MAX_TOKENS // 8, size).astype(np.int32) * 8 for size in sizes]
    passes = passes or [None] * len(weights)
    sources = [
        MixedSource(f"source{number}", NumberedSamples(lengths[number]), weight, passes[number])
        for number, weight in enumerate(weights)
    ]
    return Mixture(sources, seed=seed, **limits)


def counts_of(mixture, num_draws):
    """Samples drawn of each source before each of the next draws, [draws, sources], and the largest micro-batch."""
    draws = list(islice(mixture.draws(0), num_draws))
    counts = np.zeros((len(draws) + 1, len(mixture.names)), dtype=np.int64)
    for number, draw in enumerate(draws):
        counts[number + 1] = counts[number]
        counts[number + 1, draw.source] += len(draw.samples)
    return counts, max(len(draw.samples) for draw in draws)


@settings(max_examples=EXAMPLES, deadline=None)
@given(weights_of_sources, batching, seeds)
def test_every_source_keeps_its_share_at_every_moment(weights, limits, seed):
    counts, largest = counts_of(make_mixture(weights, seed=seed, **limits), 400)
    shares = np.asarray([float(weight / sum(weights)) for weight in weights])
    off = counts - shares * counts.sum(axis=1, keepdims=True)
    assert np.abs(off).max() <= largest + 1e-6
    steps = counts[100:] - counts[:-100]  # every window of 100 micro-batches
    assert np.abs(steps - shares * steps.sum(axis=1, keepdims=True)).max() <= 2 * largest + 1e-6


def test_a_share_of_a_thousandth_is_kept():
    mixture = make_mixture([Fraction("0.999"), Fraction("0.001")], sizes=[1000, 10], batch_size=2)
    counts, _ = counts_of(mixture, 50_000)
    assert counts[-1].tolist() == [99_900, 100]
    rare = np.flatnonzero(np.diff(counts[:, 1]))
    assert set(np.diff(rare)) == {1000}, "once in a thousand micro-batches, evenly"


@settings(max_examples=EXAMPLES, deadline=None)
@given(weights_of_sources, batching, seeds)
def test_every_epoch_of_a_source_has_each_sample_once_in_another_order(weights, limits, seed):
    mixture = make_mixture(weights, seed=seed, **limits)
    seen = {}
    for draw in islice(mixture.draws(0), 300):
        seen.setdefault((draw.source, draw.epoch), []).extend(draw.samples.tolist())
    for (source, epoch), samples in seen.items():
        size = len(mixture.sources[source].dataset)
        whole = (source, epoch + 1) in seen
        assert len(set(samples)) == len(samples)
        assert not whole or sorted(samples) == list(range(size))
        assert not whole or size < 30 or samples != seen[source, epoch + 1]


def test_sources_of_equal_size_are_not_shuffled_alike():
    mixture = make_mixture([Fraction(1), Fraction(1)], sizes=[50, 50], passes=[1, 1], batch_size=1)
    order = {0: [], 1: []}
    for draw in mixture.draws(0):
        order[draw.source] += draw.samples.tolist()
    assert sorted(order[0]) == sorted(order[1])
    assert order[0] != order[1]


@settings(max_examples=EXAMPLES, deadline=None)
@given(weights_of_sources, batching, seeds, st.data())
def test_a_source_that_ends_leaves_its_share_to_the_others(weights, limits, seed, data):
    passes = [data.draw(st.sampled_from([1, 2, 3])) for _ in weights]
    mixture = make_mixture(weights, passes=passes, seed=seed, **limits)
    draws = list(mixture.draws(0))
    assert len(draws) == mixture.count(0)
    for number, source in enumerate(mixture.sources):
        samples = [sample for draw in draws if draw.source == number for sample in draw.samples.tolist()]
        assert sorted(samples) == sorted(list(range(len(source.dataset))) * passes[number])
    last = {
        number: max(place for place, draw in enumerate(draws) if draw.source == number)
        for number in range(len(weights))
    }
    ended = min(last.values())
    left = [number for number in last if last[number] > ended]
    until = min((last[number] for number in left), default=ended)
    sizes = {
        number: sum(len(draw.samples) for draw in draws[ended + 1 : until] if draw.source == number) for number in left
    }
    largest = max(len(draw.samples) for draw in draws)
    for number in left:
        share = float(weights[number] / sum(weights[other] for other in left))
        assert abs(sizes[number] - share * sum(sizes.values())) <= 2 * largest


def test_it_ends_with_the_last_source_that_has_an_end():
    mixture = make_mixture(
        [Fraction("0.6"), Fraction("0.3"), Fraction("0.1")], sizes=[10, 20, 7], passes=[1, 1, None], batch_size=1
    )
    draws = list(mixture.draws(0))
    assert draws[-1].source == 1
    assert {draw.source for draw in draws[20:]} == {1, 2}
    assert max(draw.epoch for draw in draws if draw.source == 2) >= 0


def make_loaders(mixture, world_size, accumulation):
    return [
        StepLoader(mixture, number_collator, gradient_accumulation_steps=accumulation, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


def next_micro_batches(loaders, num_steps):
    """(source, samples) of the next steps in the order of the mixture."""
    found = []
    for _, *slots_of_ranks in zip(range(num_steps), *loaders, strict=False):
        for slot in zip(*slots_of_ranks, strict=True):
            found += [(batch.source, batch.sample_ids) for batch in slot if batch.sample_ids]
    return found


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    weights_of_sources,
    batching,
    seeds,
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=5),
)
def test_stopping_and_going_on_with_other_ranks_misses_and_repeats_nothing(weights, limits, seed, stages):
    """Each stage: so many ranks, with so much accumulation, make so many steps; then the run stops."""
    passes = [2, 1, 2, 1, 2][: len(weights)]
    mixture = make_mixture(weights, passes=passes, seed=seed, **limits)
    expected = [(draw.source, tuple(map(str, draw.samples))) for draw in mixture.draws(0)]
    state, seen = None, []
    for world_size, accumulation, num_steps in [*stages, (1, 1, len(expected))]:
        again = make_mixture(weights, passes=passes, seed=seed, **limits)
        loaders = make_loaders(again, world_size, accumulation)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        seen += next_micro_batches(loaders, num_steps)
        if loaders[0].epoch > 0:
            break
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert seen == expected


def test_the_step_handed_out_is_known_whole_on_every_rank():
    mixture = make_mixture([Fraction("0.7"), Fraction("0.3")], sizes=[9, 9], passes=[1, 1], batch_size=2)
    loaders = make_loaders(mixture, 2, 2)
    for steps in zip(*loaders, strict=True):
        drawn = [sum(len(draw.samples) for draw in loader.drawn) for loader in loaders]
        handed_out = sum(len(batch.sample_ids) for step in steps for batch in step)
        assert drawn == [handed_out] * 2


def test_a_changed_mixture_cannot_be_resumed():
    loader = make_loaders(make_mixture([Fraction(9), Fraction(1)], batch_size=2), 1, 1)[0]
    next(iter(loader))
    other = make_loaders(make_mixture([Fraction(8), Fraction(1)], batch_size=2), 1, 1)[0]
    with pytest.raises(UserError, match=r"source0.weight was 9, is 8$"):
        other.load_state_dict(loader.state_dict())


def test_the_steps_of_a_mixture_are_counted():
    ending = make_loaders(make_mixture([Fraction(1), Fraction(1)], sizes=[10, 20], passes=[1, 1], batch_size=2), 2, 2)
    assert ending[0].total_steps(1) == 4
    assert ending[0].total_steps(1, at_most=3) == 3
    endless = make_loaders(make_mixture([Fraction(1)], batch_size=2), 2, 2)
    assert endless[0].total_steps(5, at_most=1000) == 1000
