"""The random number generators of this process (Python, NumPy, torch, CUDA) as plain tensors and JSON."""

import random

import numpy as np
import torch

from ds_higgs.job.devices import uses_cuda


def capture_random_state() -> dict:
    """The state of every generator, as tensors and JSON-able values only."""
    version, python_words, gauss_next = random.getstate()
    name, numpy_words, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    assert name == "MT19937", name
    state = {
        "python_words": torch.tensor(python_words, dtype=torch.int64),
        "python": [version, gauss_next],
        "numpy_words": torch.from_numpy(np.asarray(numpy_words, dtype=np.int64)),
        "numpy": [int(position), int(has_gauss), float(cached_gaussian)],
        "torch": torch.get_rng_state(),
    }
    if uses_cuda():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict) -> None:
    """Continue every generator where `capture_random_state` found it; CUDA's only where there is one in both."""
    version, gauss_next = state["python"]
    random.setstate((version, tuple(state["python_words"].tolist()), gauss_next))
    position, has_gauss, cached_gaussian = state["numpy"]
    words = state["numpy_words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, cached_gaussian))
    torch.set_rng_state(state["torch"])
    if uses_cuda() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def reseed(seed: int, *, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank), where the number of ranks changed and no old state fits."""
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
