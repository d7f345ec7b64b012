"""The plan of an epoch: which samples form which micro-batch, from seed, epoch and lengths alone, never from ranks."""

from dataclasses import dataclass
from itertools import chain

import numpy as np

LENGTH_MULTIPLE = 8  # HiggsAudioModel pads the expanded sequence to a multiple of this
_PIECE = 1 << 16
WINDOW_BATCHES = 50  # samples are grouped by length inside a window of about this many micro-batches


@dataclass(frozen=True)
class EpochPlan:
    """Micro-batches in the order in which they are trained.

    samples: [num_samples] int32, each sample of the data set once.
    ends: [num_micro_batches] int64, where in `samples` each micro-batch ends.
    """

    samples: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, micro_batch: int) -> np.ndarray:
        start = 0 if micro_batch == 0 else self.ends[micro_batch - 1]
        return self.samples[start : self.ends[micro_batch]]


def plan_epoch(
    lengths: np.ndarray,
    *,
    seed: int,
    epoch: int,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    shuffle: bool = True,
    whole_steps: bool = False,
) -> EpochPlan:
    """Cut an epoch into micro-batches by count (`batch_size`) or by budget (`max_tokens` padded positions).

    Shuffled, samples are drawn into windows, sorted by length in their window and cut into micro-batches, whose order
    is then shuffled: padding is small and the order random. A window is at most a quarter of the epoch, so that small
    data sets, too, meet other neighbours in each epoch. Not shuffled, samples keep their order.

    Args:
        lengths: [num_samples] expanded lengths; none may exceed `max_tokens`.
        whole_steps: each "micro-batch" is what a whole optimizer step learns from, to be split over ranks: samples of
            all lengths then, sorted so that the parts are of one length each.
    """
    assert (batch_size is None) != (max_tokens is None), "one of batch_size and max_tokens"
    padded = round_up(lengths)
    if not shuffle:
        samples = np.arange(len(lengths), dtype=np.int32)
        return EpochPlan(samples, _cut(padded, batch_size, max_tokens))
    rng = np.random.default_rng([seed, epoch])
    samples = rng.permutation(len(lengths)).astype(np.int32)
    if whole_steps:
        assert batch_size is not None, "steps are cut by count"
        return EpochPlan(_sort_in_windows(samples, padded, batch_size), _cut(padded, batch_size, None))
    samples = _sort_in_windows(samples, padded, _window_size(padded, batch_size, max_tokens))
    ends = _cut(padded[samples], batch_size, max_tokens)
    return _shuffle_batches(samples, ends, rng)


def draw_half(eligible: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Half of the eligible samples, to one: [num_samples] bool, from seed and epoch alone.

    Args:
        eligible: [num_samples] bool.
    """
    candidates = np.flatnonzero(eligible)
    # A stream of its own: the epoch's plan draws from [seed, epoch].
    chosen = np.random.default_rng([seed, epoch, 1]).permutation(candidates)[: len(candidates) // 2]
    drawn = np.zeros(len(eligible), dtype=np.bool_)
    drawn[chosen] = True
    return drawn


def round_up(lengths: np.ndarray) -> np.ndarray:
    """Lengths as the model pads them."""
    return -(-np.asarray(lengths, dtype=np.int32) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def padding_share(plan: EpochPlan, lengths: np.ndarray) -> float:
    """Share of the positions computed in an epoch that hold no token."""
    starts = np.concatenate([[0], plan.ends[:-1]])
    longest = np.maximum.reduceat(round_up(lengths)[plan.samples], starts)
    computed = int((longest.astype(np.int64) * np.diff(plan.ends, prepend=0)).sum())
    return 1 - int(np.asarray(lengths, dtype=np.int64).sum()) / computed


def _window_size(padded: np.ndarray, batch_size: int | None, max_tokens: int | None) -> int:
    if len(padded) == 0:
        return 1
    per_batch = batch_size if max_tokens is None else max(1.0, max_tokens / float(padded.mean()))
    assert per_batch is not None
    return max(1, int(min(len(padded) // 4, WINDOW_BATCHES * per_batch)))


def _sort_in_windows(samples: np.ndarray, padded: np.ndarray, window: int) -> np.ndarray:
    windows = np.arange(len(samples), dtype=np.int64) // window
    return samples[np.argsort((windows << 32) | padded[samples], kind="stable")]


def _cut(padded: np.ndarray, batch_size: int | None, max_tokens: int | None) -> np.ndarray:
    if max_tokens is None:
        assert batch_size is not None
        ends = np.arange(batch_size, len(padded) + batch_size, batch_size, dtype=np.int64)
        return np.minimum(ends, len(padded))
    budget_ends: list[int] = []
    start, longest = 0, 0
    # Piece by piece: a list of all lengths would take ten times the memory of the array.
    pieces = (padded[piece : piece + _PIECE].tolist() for piece in range(0, len(padded), _PIECE))
    for index, length in enumerate(chain.from_iterable(pieces)):
        longest = max(longest, length)
        if longest * (index + 1 - start) > max_tokens and index > start:
            budget_ends.append(index)
            start, longest = index, length
    if start < len(padded):
        budget_ends.append(len(padded))
    return np.asarray(budget_ends, dtype=np.int64)


def _shuffle_batches(samples: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> EpochPlan:
    sizes = np.diff(ends, prepend=0)
    order = rng.permutation(len(ends))
    new_ends = np.cumsum(sizes[order])
    new_starts = new_ends - sizes[order]
    gather = np.arange(len(samples), dtype=np.int64) + np.repeat((ends - sizes)[order] - new_starts, sizes[order])
    return EpochPlan(samples[gather], new_ends)
