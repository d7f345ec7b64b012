"""Which samples form which micro-batch, in which order: of one data set, epoch by epoch."""

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample

from ds_higgs.data.sampling import EpochPlan, plan_epoch


class Samples(Protocol):
    """What the loader needs of an epoch's samples.

    filler_index: a sample with audio to learn (any sample where none has).
    lengths: [num_samples] expanded lengths that the epoch is planned with.
    """

    filler_index: int
    lengths: np.ndarray

    def __getitem__(self, index: int) -> ChatMLDatasetSample: ...
    def sample_id(self, index: int) -> str: ...


class SampleSource(Protocol):
    """What the loader needs of a data set.

    lengths: [num_samples] expanded lengths, at most, the same in every epoch.
    redraws: whether an epoch has references of its own, and lengths with them.
    """

    lengths: np.ndarray

    @property
    def redraws(self) -> bool: ...

    def __len__(self) -> int: ...
    def in_epoch(self, epoch: int, *, seed: int) -> Samples: ...


class Draw(NamedTuple):
    """One micro-batch: its samples, of which source (by number), in which epoch of that source."""

    source: int
    epoch: int
    samples: np.ndarray


class Order(Protocol):
    """The micro-batches of a run, in stretches that the loader calls epochs; it knows no ranks.

    names: of the sources.
    even: whether all epochs have equally many micro-batches.
    """

    names: tuple[str, ...]
    even: bool

    def num_epochs(self, epochs: int) -> int:
        """Stretches of a run whose configuration says `epochs`."""

    def count(self, epoch: int, *, at_most: int | None = None) -> int:
        """Micro-batches of an epoch; no more are counted than `at_most`."""

    def draws(self, epoch: int, start: int = 0) -> Iterator[Draw]:
        """The micro-batches of an epoch from number `start` on."""

    def position_after(self, epoch: int, done: int) -> tuple[int, int]:
        """Where to go on after `done` micro-batches of an epoch: at an epoch's end, at the next one's start."""

    def samples(self, source: int, epoch: int) -> Samples:
        """A source's samples, as its epoch has them."""

    def describe(self) -> dict[str, Any]:
        """What the order depends on: a checkpoint goes on only where all of it is as it was."""


class EpochOrder:
    """All samples of one data set in each epoch, in an order from seed and epoch alone; see `plan_epoch`."""

    names: tuple[str, ...] = ("train",)

    def __init__(
        self,
        dataset: SampleSource,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        whole_steps: bool = False,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.whole_steps = whole_steps
        self.even = max_tokens is None
        self._plan: tuple[int, EpochPlan] | None = None

    def num_epochs(self, epochs: int) -> int:
        return epochs

    def count(self, epoch: int, *, at_most: int | None = None) -> int:
        count = len(self._plan_of(epoch))
        return count if at_most is None else min(count, at_most)

    def draws(self, epoch: int, start: int = 0) -> Iterator[Draw]:
        plan = self._plan_of(epoch)
        return (Draw(0, epoch, plan[number]) for number in range(start, len(plan)))

    def position_after(self, epoch: int, done: int) -> tuple[int, int]:
        return (epoch + 1, 0) if done == self.count(epoch) else (epoch, done)

    def samples(self, source: int, epoch: int) -> Samples:
        return self.dataset.in_epoch(epoch, seed=self.seed)

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "num_samples": len(self.dataset),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "shuffle": self.shuffle,
            "lengths_checksum": zlib.crc32(np.ascontiguousarray(self.dataset.lengths).tobytes()),
        }
        # Unknown to older checkpoints.
        described |= {"whole_steps": True} if self.whole_steps else {}
        return described | ({"reference": "redraw"} if self.dataset.redraws else {})

    def _plan_of(self, epoch: int) -> EpochPlan:
        if self._plan is None or self._plan[0] != epoch:
            source = self.dataset.in_epoch(epoch, seed=self.seed) if self.dataset.redraws else self.dataset
            plan = plan_epoch(
                source.lengths,
                seed=self.seed,
                epoch=epoch,
                batch_size=self.batch_size,
                max_tokens=self.max_tokens,
                shuffle=self.shuffle,
                whole_steps=self.whole_steps,
            )
            self._plan = (epoch, plan)
        return self._plan[1]
