"""Deal an epoch's micro-batches to ranks and accumulation slots, collate them in workers, keep the position."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ds_higgs.batch import Batch
from ds_higgs.data.collation import BatchCollator, mask_all_labels
from ds_higgs.data.order import Draw, Order, Samples
from ds_higgs.data.workers import Workers
from ds_higgs.errors import UserError

Step = tuple[Draw, ...]  # the micro-batches of all ranks and accumulation slots


class StepLoader:
    """Iterates over the rest of the current epoch: one list of micro-batches, one per accumulation slot, per step.

    The order of an epoch does not know ranks: step k on W ranks with accumulation A takes its next W x A micro-batches,
    number m of them goes to rank m % W, slot m // W. So the position is one number, and a checkpoint continues on any
    number of ranks with the samples not yet seen. In the last step of an epoch a rank without a micro-batch gets a
    filler, which counts nothing, so that all ranks make the same calls.

    workers: the processes that collate, where there are any.
    drawn: the step last handed out, as all ranks have it.

    Args:
        whole_steps: what the order calls a micro-batch is a whole step's samples, sorted by length: it is split evenly
            over ranks and accumulation slots, so that the samples of a step depend on neither.
        prefetch_steps: how many steps ahead the workers collate.
    """

    def __init__(
        self,
        order: Order,
        collator: BatchCollator,
        *,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_steps: int = 2,
        whole_steps: bool = False,
    ):
        self.order = order
        self.collator = collator
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.prefetch_steps = prefetch_steps
        self.whole_steps = whole_steps
        self.workers = Workers()
        self.epoch = 0
        self.micro_batches_done = 0
        self.drawn: Step = ()

    @property
    def draws_per_step(self) -> int:
        """How far the position moves on in a step."""
        return 1 if self.whole_steps else self.micro_batches_per_step

    @property
    def micro_batches_per_step(self) -> int:
        return self.world_size * self.gradient_accumulation_steps

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch. With `max_tokens` it may differ a little from epoch to epoch."""
        return self._as_steps(self.order.count(epoch))

    def total_steps(self, epochs: int, *, at_most: int | None = None) -> int:
        """Optimizer steps of the epochs 0 to `epochs` - 1; no more epochs are planned than `at_most` steps need."""
        epochs = self.order.num_epochs(epochs)
        if self.order.even:
            total = epochs * self.steps_in_epoch(0)
            return total if at_most is None else min(total, at_most)
        total, left = 0, None
        for epoch in range(epochs):
            if at_most is not None:
                left = (at_most - total) * self.draws_per_step
            total += self._as_steps(self.order.count(epoch, at_most=left))
            if total == at_most:
                break
        return total

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out, and what the order of samples depends on."""
        epoch, done = self.order.position_after(self.epoch, self.micro_batches_done)
        return {"epoch": epoch, "micro_batches_done": done, "order": self.order.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position, also on another number of ranks or with another accumulation.

        Raises:
            UserError: the saved position is inside an epoch of another order of samples.
        """
        saved, current = state["order"], self.order.describe()
        changed = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
        if changed and state["micro_batches_done"] > 0:
            raise UserError(
                "cannot resume inside an epoch: the order of samples has changed since the checkpoint was saved: "
                + "; ".join(f"{key} was {saved.get(key)}, is {current.get(key)}" for key in changed)
            )
        self.epoch = state["epoch"]
        self.micro_batches_done = state["micro_batches_done"]

    def __iter__(self) -> Iterator[list[Batch]]:
        steps: deque[Step] = deque()  # taken from the order, and not yet handed out
        batches = iter(self._build_data_loader(self._own_draws(steps)))
        slots: list[Batch] = []
        while True:
            with self.workers.waiting():
                batch = next(batches, None)
            if batch is None:
                break
            slots.append(batch)
            if len(slots) == self.gradient_accumulation_steps:
                self.drawn = steps.popleft()
                self.micro_batches_done += len(self.drawn)
                step, slots = slots, []
                yield step
        self.epoch += 1
        self.micro_batches_done = 0

    def _own_draws(self, steps: deque[Step]) -> Iterator[Draw]:
        """This rank's micro-batches from the current position on, empty where the epoch's last step has no more."""
        draws = self.order.draws(self.epoch, self.micro_batches_done)
        while step := tuple(islice(draws, self.draws_per_step)):
            steps.append(step)
            if self.whole_steps:
                step = _split(step[0], self.micro_batches_per_step)
            for slot in range(self.gradient_accumulation_steps):
                number = slot * self.world_size + self.rank
                yield step[number] if number < len(step) else step[0]._replace(samples=step[0].samples[:0])

    def _as_steps(self, num_micro_batches: int) -> int:
        return -(-num_micro_batches // self.draws_per_step)

    def _build_data_loader(self, draws: Iterator[Draw]) -> DataLoader:
        prefetch_factor = None
        if self.num_workers > 0:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns at each fork
            prefetch_factor = -(-self.prefetch_steps * self.gradient_accumulation_steps // self.num_workers)
        return DataLoader(
            _MicroBatches(self.order, self.collator),
            batch_size=None,
            sampler=draws,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            worker_init_fn=self.workers.starter(self.num_workers),
            pin_memory=self.pin_memory,
            # Its own generator: else each epoch would draw from torch's global one and change what dropout draws.
            generator=torch.Generator().manual_seed(0),
            prefetch_factor=prefetch_factor,
        )


class _MicroBatches(Dataset):
    """Micro-batches by what is drawn, collated where they are asked for: in a worker process."""

    def __init__(self, order: Order, collator: BatchCollator):
        self._order = order
        self._collator = collator
        self._samples: dict[int, tuple[int, Samples]] = {}  # of each source, in the epoch last met

    def __getitem__(self, draw: Draw) -> Batch:
        samples = self._samples_of(draw.source, draw.epoch)
        if not len(draw.samples):
            return mask_all_labels(self._collate(samples, [samples.filler_index]))
        return replace(self._collate(samples, draw.samples.tolist()), source=draw.source)

    def _samples_of(self, source: int, epoch: int) -> Samples:
        if source not in self._samples or self._samples[source][0] != epoch:
            self._samples[source] = (epoch, self._order.samples(source, epoch))
        return self._samples[source][1]

    def _collate(self, samples: Samples, indices: Sequence[int]) -> Batch:
        return self._collator([samples[index] for index in indices], [samples.sample_id(index) for index in indices])


def _split(draw: Draw, parts: int) -> Step:
    """In the order of its samples, as evenly as possible."""
    return tuple(draw._replace(samples=samples) for samples in np.array_split(draw.samples, parts))


def _unchanged(batch: Any) -> Any:
    return batch
