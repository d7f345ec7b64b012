"""What a test process shares between its tests: switches that a test must leave as it found them, random generators."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers.modeling_utils

SEED = 0
# pytest's own; what OpenMP libraries note down when they are first imported.
_IGNORED_VARIABLES = ("PYTEST_CURRENT_TEST", "KMP_", "TORCHINDUCTOR_CACHE_DIR")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


def read_process_state() -> dict[str, Any]:
    """Every switch by name; equal before and after a test that leaves nothing behind."""
    state: dict[str, Any] = {
        "working directory": os.getcwd(),
        "sys.path": tuple(sys.path),
        "torch default dtype": torch.get_default_dtype(),
        "torch default device": torch.get_default_device(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch gradients": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "torch process group": torch.distributed.is_initialized(),
        "F.linear": F.linear,  # DeepSpeed replaces it inside zero.Init
        # False inside from_pretrained: models made then keep torch's own initial weights
        "transformers initialises weights": transformers.modeling_utils._init_weights,
    }
    state |= {f"signal {number.name}": signal.getsignal(number) for number in _SIGNALS}
    state |= {f"torch.nn.init.{name}": f for name, f in vars(torch.nn.init).items() if name.endswith("_")}
    return state | {f"${key}": value for key, value in os.environ.items() if not key.startswith(_IGNORED_VARIABLES)}


def describe_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each switch that differs."""
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return [f"{name}: {before.get(name)!r} before, {after.get(name)!r} after" for name in names]


def seed_generators() -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Freshly seeded global generators inside; outside they are where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        seed_generators()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
