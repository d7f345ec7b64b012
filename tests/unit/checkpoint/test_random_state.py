"""The random generators continue exactly where they were captured."""

import random

import numpy as np
import torch

from ds_higgs.checkpoint import capture_random_state, reseed, restore_random_state
from ds_higgs.checkpoint.loading import decode_rank_state
from ds_higgs.checkpoint.saving import encode_rank_state


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_generators_continue_through_a_file(tmp_path):
    random.gauss(0, 1)  # leaves a second Gaussian waiting, in Python's generator and in NumPy's
    np.random.randn()
    path = tmp_path / "rank.safetensors"
    path.write_bytes(encode_rank_state({**capture_random_state(), "note": [1, "two"]}))
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = decode_rank_state(path)
    restore_random_state(state)
    assert [draw(), draw()] == expected
    assert state["note"] == [1, "two"]


def test_reseed_depends_on_seed_step_and_rank():
    drawn = []
    for seed, step, rank in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1, 0)]:
        reseed(seed, step=step, rank=rank)
        drawn.append(draw())
    assert drawn[0] == drawn[4]
    assert len(set(map(str, drawn))) == 4
