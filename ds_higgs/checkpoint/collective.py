"""What the ranks of a job tell each other about a checkpoint; with no process group there is one rank, 0."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give its result to every rank.

    Raises:
        OSError, ValueError: what `action` raised on rank 0, on every rank alike, so that no rank waits for another.
    """
    outcome: list = [None, None]  # result, failure
    if rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result
