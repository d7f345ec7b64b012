"""Memory per GPU before anything is loaded, and what fits a card."""

import dataclasses
from collections.abc import Mapping

from ds_higgs.sizing.inputs import BatchShape, ModelShape, Policy
from ds_higgs.sizing.memory import estimate_memory, total_bytes

# From the fastest to the one that keeps least: recompute no layer, every 4th, every 2nd, every layer.
CHECKPOINTING_CHOICES = (None, 4, 2, 1)
# Of a card's memory: other processes and what the estimate does not see take the rest.
USABLE_SHARE = 0.92


@dataclasses.dataclass(frozen=True)
class Estimator:
    """The estimate's inputs that do not depend on the batch."""

    shape: ModelShape
    counts: Mapping[str, int]
    policy: Policy

    def terms(self, batch: BatchShape, *, checkpoint_every: int | None) -> dict[str, int]:
        """Bytes by term for `batch`."""
        return estimate_memory(
            self.shape,
            batch,
            dataclasses.replace(self.policy, checkpoint_every=checkpoint_every),
            frozen=self.counts["total"] - self.counts["trainable"],
            trainable=self.counts["trainable"],
            quantizable=self.counts["quantizable"],
            largest=self.counts["largest"],
        )

    def fits(self, batch: BatchShape, *, checkpoint_every: int | None, memory_bytes: float) -> bool:
        return total_bytes(self.terms(batch, checkpoint_every=checkpoint_every)) <= USABLE_SHARE * memory_bytes

    def largest_batch(self, positions: int, *, checkpoint_every: int | None, memory_bytes: float) -> int:
        """Most samples of `positions` positions that fit; 0 if not even one does."""
        smallest, tried = 0, 1
        while self.fits(
            BatchShape.typical(tried, positions), checkpoint_every=checkpoint_every, memory_bytes=memory_bytes
        ):
            smallest, tried = tried, 2 * tried
        while tried - smallest > 1:
            middle = (smallest + tried) // 2
            batch = BatchShape.typical(middle, positions)
            if self.fits(batch, checkpoint_every=checkpoint_every, memory_bytes=memory_bytes):
                smallest = middle
            else:
                tried = middle
        return smallest

    def choose_checkpointing(self, batch: BatchShape, *, memory_bytes: float) -> int | None:
        """The fastest of CHECKPOINTING_CHOICES that fits; the last one if none does."""
        for every in CHECKPOINTING_CHOICES:
            if self.fits(batch, checkpoint_every=every, memory_bytes=memory_bytes):
                return every
        return CHECKPOINTING_CHOICES[-1]


def describe_checkpointing(every: int | None) -> str:
    """In words: "none", "full", "every 4 layers"."""
    return {None: "none", 1: "full"}.get(every, f"every {every} layers")
