"""Ranks' own channel: every rank's bytes on every rank, whatever their lengths."""

import multiprocessing

import torch.distributed as dist

from ds_higgs.job import distributed
from tests.support.patience import HANG_S

CONTENTS = [b"x" * 10, b"", bytes(range(7))]


def gather(rank, store, block_bytes, answers):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(CONTENTS))
    distributed.GATHER_BLOCK_BYTES = block_bytes
    answers.put(distributed.gather_bytes(CONTENTS[rank]))
    dist.destroy_process_group()


def test_alone_a_process_gathers_its_own_bytes():
    assert distributed.gather_bytes(b"x") == [b"x"]


def test_contents_of_unequal_length_arrive_whole_and_in_order(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=gather, args=(rank, tmp_path / "store", 4, answers)) for rank in range(len(CONTENTS))
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=HANG_S) for _ in CONTENTS]
    for process in processes:
        process.join()
    assert found == [CONTENTS] * len(CONTENTS)
