"""Steps for ranks: coverage, fillers, resume, workers, and no touch of the global random state."""

import itertools
import multiprocessing
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.workers import Workers
from ds_higgs.errors import UserError
from ds_higgs.job.processes import OtherProcess
from tests.support.patience import HANG_S, patience


@pytest.fixture
def make_loader(mixed_dataset, make_rules):
    def make(*, batch_size=2, max_tokens=None, seed=0, **settings):
        order = EpochOrder(mixed_dataset, batch_size=batch_size, max_tokens=max_tokens, seed=seed)
        return StepLoader(order, BatchCollator(make_rules().layout), **settings)

    return make


def ids_of(steps):
    return [[batch.sample_ids for batch in step] for step in steps]


def assert_equal_batches(first, second):
    assert first.sample_ids == second.sample_ids
    assert first.num_tokens == second.num_tokens
    assert torch.equal(first.labels.text, second.labels.text)
    assert torch.equal(first.labels.audio, second.labels.audio)
    assert set(first.model_inputs) == set(second.model_inputs)
    assert all(torch.equal(first.model_inputs[name], second.model_inputs[name]) for name in first.model_inputs)


def test_micro_batches_are_dealt_as_the_plan_says(make_loader):
    (whole,) = [[batch.sample_ids for step in make_loader() for batch in step]]
    steps = [ids_of(make_loader(rank=rank, world_size=2, gradient_accumulation_steps=2)) for rank in range(2)]
    for step, rank, slot in itertools.product(range(2), range(2), range(2)):
        number = 4 * step + 2 * slot + rank
        assert steps[rank][step][slot] == (whole[number] if number < len(whole) else ())


def test_a_filler_counts_nothing_but_has_audio(make_loader):
    loaders = [make_loader(rank=rank, world_size=4, gradient_accumulation_steps=2) for rank in range(4)]
    batches = [batch for loader in loaders for step in loader for batch in step]
    fillers = [batch for batch in batches if batch.sample_ids == ()]
    assert len(batches) == 8
    assert len(fillers) == 3
    for filler in fillers:
        assert filler.num_tokens == 0
        assert (filler.labels.text == IGNORE_INDEX).all()
        assert (filler.labels.audio == IGNORE_INDEX).all()
        assert filler.model_inputs["audio_out_ids"].shape[1] > 0


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"batch_size": None, "max_tokens": 250}])
def test_workers_give_the_same_batches(make_loader, settings):
    plain, with_workers = make_loader(**settings), make_loader(num_workers=2, **settings)
    for _ in range(2):
        steps = list(zip(plain, with_workers, strict=True))
        assert len(steps) > 3
        for first, second in steps:
            assert_equal_batches(first[0], second[0])


def test_resuming_goes_on_after_the_last_step_handed_out(make_loader):
    """Also where workers have already collated further."""
    loader = make_loader(num_workers=2)
    expected = ids_of(loader) + ids_of(loader)
    for done in range(len(expected) + 1):
        loader = make_loader(num_workers=2)
        steps = itertools.chain(loader, loader)
        seen = [next(steps) for _ in range(done)]
        resumed = make_loader()
        resumed.load_state_dict(loader.state_dict())
        rest = ids_of(resumed) if resumed.epoch == 1 else ids_of(resumed) + ids_of(resumed)
        if done < len(expected):
            assert ids_of(seen) + rest == expected


def test_the_state_at_an_epochs_end_is_the_next_epochs_start(make_loader):
    loader = make_loader()
    for _ in loader:
        state = loader.state_dict()
    assert (state["epoch"], state["micro_batches_done"]) == (1, 0)
    assert state == loader.state_dict()


def test_epochs_differ_and_a_seed_repeats_them(make_loader):
    loader = make_loader()
    first, second = ids_of(loader), ids_of(loader)
    assert first != second
    assert sorted(itertools.chain(*itertools.chain(*first))) == sorted(itertools.chain(*itertools.chain(*second)))
    assert ids_of(make_loader()) == first
    assert ids_of(make_loader(seed=1)) != first


def test_changed_data_cannot_be_resumed_inside_an_epoch(make_loader):
    loader = make_loader()
    next(iter(loader))
    for changes in ({"batch_size": 3}, {"seed": 5}):
        with pytest.raises(UserError, match=f"{next(iter(changes))} was "):
            make_loader(**changes).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(make_loader, num_workers):
    """Else a resumed run, which loads fewer batches, would draw other dropout masks."""
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in make_loader(num_workers=num_workers):
        pass
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_total_steps_counts_the_steps_of_all_epochs(make_loader):
    for settings in ({"batch_size": 4}, {"batch_size": None, "max_tokens": 250}):
        loader = make_loader(world_size=2, gradient_accumulation_steps=2, **settings)
        assert loader.total_steps(3) == sum(len(list(loader)) for _ in range(3))


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"batch_size": None, "max_tokens": 250}])
def test_a_limit_on_steps_needs_no_plan_of_all_epochs(make_loader, settings):
    loader = make_loader(**settings)
    with no_longer_than(20):
        assert loader.total_steps(10**9, at_most=7) == 7
    assert loader.total_steps(1, at_most=10**9) == loader.steps_in_epoch(0)


@contextmanager
def no_longer_than(seconds):
    def fail(number, frame):
        raise TimeoutError

    usual = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


def test_a_worker_without_file_handles_does_not_keep_the_rank_waiting(make_loader):
    """It needs none to hand over a batch."""
    loader = make_loader(num_workers=1, batch_size=1)
    with no_longer_than(30):
        steps = iter(loader)
        batches = [next(steps)]
        [worker] = loader.workers.processes
        in_use = [int(name) for name in os.listdir(f"/proc/{worker}/fd")]
        first_free = min(set(range(len(in_use) + 1)) - set(in_use))
        _, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (first_free, hard))
        batches += steps
    for (batch,), (expected,) in zip(batches, make_loader(batch_size=1), strict=True):
        assert_equal_batches(batch, expected)


def test_a_stopped_worker_that_the_rank_waits_for_is_found(make_loader):
    loader = make_loader(num_workers=1, batch_size=1)
    steps = iter(loader)
    next(steps)
    [worker] = loader.workers.processes
    os.kill(worker, signal.SIGSTOP)
    assert [loader.workers.stopped(looks=3) for _ in range(5)] == [None] * 5, "nobody waits for it"
    with ThreadPoolExecutor() as pool:
        rest = pool.submit(lambda: sum(1 for _ in steps))
        found = [look_at(loader) for _ in range(50)]
        os.kill(worker, signal.SIGCONT)
        assert rest.result(timeout=HANG_S) == len(loader.order.dataset) - 1
    assert f"data worker 0 (process {worker}) is stopped" in next(message for message in found if message)
    assert loader.workers.stopped(looks=3) is None


def test_a_worker_ends_with_a_rank_that_is_killed():
    """Also one that waits: for room in its pipe, or for a lock that a thread of the rank held as it was forked."""
    fork = multiprocessing.get_context("fork")
    numbers = fork.Queue()

    def work(begin):
        begin(0)
        numbers.put(os.getpid())
        threading.Event().wait()

    def start_a_worker():
        fork.Process(target=work, args=(Workers().starter(1),)).start()
        threading.Event().wait()

    rank = fork.Process(target=start_a_worker)
    rank.start()
    worker = OtherProcess(numbers.get(timeout=HANG_S))
    rank.kill()
    rank.join()
    deadline = time.monotonic() + patience(10)
    try:
        while not worker.is_dead():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker.number, signal.SIGKILL)


def look_at(loader):
    time.sleep(0.05)
    return loader.workers.stopped(looks=3)
