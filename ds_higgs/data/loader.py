"""Deal an epoch's micro-batches to ranks and accumulation slots, collate them in workers, keep the position."""

import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from torch.utils.data import DataLoader, Dataset

from ds_higgs.batch import Batch
from ds_higgs.data.collation import BatchCollator, mask_all_labels
from ds_higgs.data.sampling import EpochPlan, plan_epoch
from ds_higgs.data.workers import Workers
from ds_higgs.errors import UserError

FILLER = -1  # in place of a micro-batch number


class Samples(Protocol):
    """What the loader needs of an epoch's samples.

    filler_index: a sample with audio to learn (any sample where none has).
    """

    filler_index: int

    def __getitem__(self, index: int) -> ChatMLDatasetSample: ...
    def sample_id(self, index: int) -> str: ...


class SampleSource(Protocol):
    """What the loader needs of a data set.

    lengths: [num_samples] expanded lengths, the same in every epoch.
    """

    lengths: np.ndarray

    def __len__(self) -> int: ...
    def in_epoch(self, epoch: int, *, seed: int) -> Samples: ...


class StepLoader:
    """Iterates over the rest of the current epoch: one list of micro-batches, one per accumulation slot, per step.

    The plan of an epoch does not know ranks: step k on W ranks with accumulation A takes its next W x A micro-batches,
    number m of them goes to rank m % W, slot m // W. So the position is one number, and a checkpoint continues on any
    number of ranks with the samples not yet seen. In the last step of an epoch a rank without a micro-batch gets a
    filler, which counts nothing, so that all ranks make the same calls.

    workers: the processes that collate, where there are any.

    Args:
        batch_size, max_tokens: one of them; see `plan_epoch`.
        prefetch_steps: how many steps ahead the workers collate.
    """

    def __init__(
        self,
        dataset: SampleSource,
        collator: BatchCollator,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_steps: int = 2,
    ):
        self.dataset = dataset
        self.collator = collator
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.prefetch_steps = prefetch_steps
        self.workers = Workers()
        self.epoch = 0
        self.micro_batches_done = 0
        self._plan: tuple[int, EpochPlan] | None = None
        self._steps: dict[int, int] = {}

    @property
    def micro_batches_per_step(self) -> int:
        return self.world_size * self.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the current epoch, from its start."""
        return self.steps_in_epoch(self.epoch)

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch. With `max_tokens` it may differ a little from epoch to epoch."""
        if epoch not in self._steps:
            self._steps[epoch] = -(-len(self._plan_of(epoch)) // self.micro_batches_per_step)
        return self._steps[epoch]

    def total_steps(self, epochs: int, *, at_most: int | None = None) -> int:
        """Optimizer steps of the epochs 0 to `epochs` - 1; no more epochs are planned than `at_most` steps need."""
        if self.max_tokens is None:  # every epoch is as long as the first one
            total = epochs * self.steps_in_epoch(0)
        else:
            total = 0
            for epoch in range(epochs):
                total += self.steps_in_epoch(epoch)
                if at_most is not None and total >= at_most:
                    break
        return total if at_most is None else min(total, at_most)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out, and what the order of samples depends on."""
        epoch, done = self.epoch, self.micro_batches_done
        if done == len(self._plan_of(epoch)):
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "micro_batches_done": done, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position, also on another number of ranks or with another accumulation.

        Raises:
            UserError: the saved position is inside an epoch of another order of samples.
        """
        saved, current = state["order"], self._order()
        changed = [f"{key} was {saved[key]}, is {current[key]}" for key in current if saved[key] != current[key]]
        if changed and state["micro_batches_done"] > 0:
            raise UserError(
                "cannot resume inside an epoch: the order of samples has changed since the checkpoint was saved: "
                + "; ".join(changed)
            )
        self.epoch = state["epoch"]
        self.micro_batches_done = state["micro_batches_done"]

    def __iter__(self) -> Iterator[list[Batch]]:
        plan = self._plan_of(self.epoch)
        numbers = list(self._own_micro_batches(len(plan)))
        batches = iter(self._build_data_loader(plan, numbers))
        slots: list[Batch] = []
        for _ in numbers:
            with self.workers.waiting():
                slots.append(next(batches))
            if len(slots) == self.gradient_accumulation_steps:
                self.micro_batches_done = min(self.micro_batches_done + self.micro_batches_per_step, len(plan))
                step, slots = slots, []
                yield step
        self.epoch += 1
        self.micro_batches_done = 0

    def _own_micro_batches(self, num_micro_batches: int) -> Iterator[int]:
        """This rank's micro-batch numbers from the current position on, FILLER where the epoch has no more."""
        for first in range(self.micro_batches_done, num_micro_batches, self.micro_batches_per_step):
            for slot in range(self.gradient_accumulation_steps):
                number = first + slot * self.world_size + self.rank
                yield number if number < num_micro_batches else FILLER

    def _build_data_loader(self, plan: EpochPlan, numbers: Sequence[int]) -> DataLoader:
        prefetch_factor = None
        if self.num_workers > 0:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns at each fork
            prefetch_factor = -(-self.prefetch_steps * self.gradient_accumulation_steps // self.num_workers)
        return DataLoader(
            _MicroBatches(self.dataset.in_epoch(self.epoch, seed=self.seed), self.collator, plan),
            batch_size=None,
            sampler=numbers,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            worker_init_fn=self.workers.starter(self.num_workers),
            pin_memory=self.pin_memory,
            # Its own generator: else each epoch would draw from torch's global one and change what dropout draws.
            generator=torch.Generator().manual_seed(self.seed),
            prefetch_factor=prefetch_factor,
        )

    def _plan_of(self, epoch: int) -> EpochPlan:
        if self._plan is None or self._plan[0] != epoch:
            plan = plan_epoch(
                self.dataset.lengths,
                seed=self.seed,
                epoch=epoch,
                batch_size=self.batch_size,
                max_tokens=self.max_tokens,
                shuffle=self.shuffle,
            )
            self._plan = (epoch, plan)
        return self._plan[1]

    def _order(self) -> dict[str, Any]:
        return {
            "num_samples": len(self.dataset),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "shuffle": self.shuffle,
            "lengths_checksum": zlib.crc32(np.ascontiguousarray(self.dataset.lengths).tobytes()),
        }


class _MicroBatches(Dataset):
    """Micro-batches by number, collated where they are asked for: in a worker process."""

    def __init__(self, dataset: Samples, collator: BatchCollator, plan: EpochPlan):
        self._dataset = dataset
        self._collator = collator
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> Batch:
        if number == FILLER:
            return mask_all_labels(self._collate([self._dataset.filler_index]))
        return self._collate([int(index) for index in self._plan[number]])

    def _collate(self, indices: Sequence[int]) -> Batch:
        samples = [self._dataset[index] for index in indices]
        return self._collator(samples, [self._dataset.sample_id(index) for index in indices])


def _unchanged(batch: Any) -> Any:
    return batch
