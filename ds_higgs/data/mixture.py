"""Several sources in one run: whose micro-batch comes next, so that every source keeps its share of the samples.

Each source has its own epochs, shuffled by themselves and grouped by length; a micro-batch is of one source. The next
one is chosen as packets are in WF2Q (Bennett and Zhang, 1996): among the sources that are not ahead of their share,
the one whose next micro-batch would be due first. A source is then never more than about one micro-batch off its
share of all samples since the start, whatever the weights, and so about two in any stretch of steps.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import gcd, lcm
from typing import Any

import numpy as np

from ds_higgs.data.order import Draw, EpochOrder, Samples, SampleSource


@dataclass(frozen=True)
class MixedSource:
    """One data set of a mixture.

    weight: its share of the samples, against the others' weights.
    passes: epochs of its own after which it ends, and the others share what it had; None: it never ends.
    """

    name: str
    dataset: SampleSource
    weight: Fraction
    passes: int | None


class Mixture:
    """One stretch of micro-batches over all sources; it ends when every source that has an end has come to it.

    A micro-batch's number in the stretch says everything: where a run goes on, the ones before are drawn again and
    left aside (some microseconds each).

    Args:
        sources: with different names, at least one.
        batch_size, max_tokens: one of them; see `plan_epoch`.
    """

    even = False

    def __init__(
        self,
        sources: Sequence[MixedSource],
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
    ):
        self.sources = tuple(sources)
        self.names = tuple(source.name for source in sources)
        self.seed = seed
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self._weights = _as_integers([source.weight for source in sources])
        # Seeds of their own: sources of equal size, of two languages say, would else be shuffled alike.
        self._orders = [
            EpochOrder(source.dataset, batch_size=batch_size, max_tokens=max_tokens, seed=_seed_of(seed, number))
            for number, source in enumerate(sources)
        ]

    def num_epochs(self, epochs: int) -> int:
        return 1  # the sources count their own

    def count(self, epoch: int, *, at_most: int | None = None) -> int:
        assert at_most is not None or any(source.passes is not None for source in self.sources), "it has no end"
        return sum(1 for _ in islice(self.draws(epoch), at_most))

    def draws(self, epoch: int, start: int = 0) -> Iterator[Draw]:
        return islice(self._draws(), start, None) if epoch == 0 else iter(())

    def position_after(self, epoch: int, done: int) -> tuple[int, int]:
        return epoch, done

    def samples(self, source: int, epoch: int) -> Samples:
        return self._orders[source].samples(0, epoch)

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"seed": self.seed, "batch_size": self.batch_size, "max_tokens": self.max_tokens}
        for source, weight, order in zip(self.sources, self._weights, self._orders, strict=True):
            of_order = order.describe()
            kept = ("num_samples", "lengths_checksum", "reference")
            found = {key: of_order[key] for key in kept if key in of_order}
            found |= {"weight": weight, "passes": source.passes}
            described |= {f"{source.name}.{key}": value for key, value in found.items()}
        return described

    def _draws(self) -> Iterator[Draw]:
        streams = [self._stream(number) for number in range(len(self.sources))]
        heads = {number: next(stream) for number, stream in enumerate(streams)}
        while heads:
            last = yield from self._share_out(heads, streams)
            del heads[last]
            if not any(self.sources[number].passes for number in heads):
                return

    def _share_out(self, heads: dict[int, Draw], streams: Sequence[Iterator[Draw]]) -> Generator[Draw, None, int]:
        """Draw from `heads`, each source's next micro-batch, until a source ends; return its number."""
        weights = {number: self._weights[number] for number in heads}
        all_weights = sum(weights.values())
        drawn, total = dict.fromkeys(heads, 0), 0
        while True:
            # In whole numbers, so that some source is always at or below its share.
            behind = [number for number in heads if drawn[number] * all_weights <= weights[number] * total]
            chosen = min(behind, key=lambda number: (drawn[number] + len(heads[number].samples)) / weights[number])
            draw = heads[chosen]
            yield draw
            drawn[chosen] += len(draw.samples)
            total += len(draw.samples)
            following = next(streams[chosen], None)
            if following is None:
                return chosen
            heads[chosen] = following

    def _stream(self, number: int) -> Iterator[Draw]:
        """A source's micro-batches, pass after pass."""
        passes, epoch = self.sources[number].passes, 0
        while passes is None or epoch < passes:
            for draw in self._orders[number].draws(epoch):
                yield Draw(number, epoch, draw.samples)
            epoch += 1


def _as_integers(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in the same proportions."""
    common = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * common) for weight in weights]
    return [number // gcd(*whole) for number in whole]


def _seed_of(seed: int, source: int) -> int:
    return int(np.random.SeedSequence([seed, source]).generate_state(1, np.uint64)[0])
