"""An exponential moving average (EMA) of the trained weights, in fp32 beside the masters, split as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import DeepSpeedEngine

from ds_higgs.checkpoint.deepspeed_parts import AVERAGE, masters, publish_masters


class Average:
    """The average of an engine's masters. Every rank makes the same calls.

    It lies in the optimizer's state, beside the moments: it is saved, split anew and loaded with them.

    Args:
        decay: of what the average was, at each update; less of it in the first ones.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float):
        self._engine = engine
        self._decay = decay
        self._values: list[torch.Tensor] = []
        self.take_over()

    def take_over(self) -> None:
        """Go on from what a checkpoint has brought, or, where that had no average, from the weights as they are."""
        state = self._engine.optimizer.state
        of_masters = [(master, state.get(master, {})) for master in masters(self._engine)]
        self._values = [one[AVERAGE] if AVERAGE in one else master.detach().clone() for master, one in of_masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that optimizer step `step`, counted from 1, has made.

        An average of few steps would be the weights that the run began with: the decay is (1 + step) / (10 + step)
        until that reaches its value.
        """
        current = masters(self._engine)
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._values, current, 1 - decay)
        for master, value in zip(current, self._values, strict=True):
            self._engine.optimizer.state[master][AVERAGE] = value  # not before: an optimizer begins with an empty one

    @contextmanager
    def in_place(self, *, also_after: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Have the model be the averaged one; nothing may train or be saved to go on from meanwhile.

        Args:
            also_after: an exception that all ranks raise together. After any other the model stays the averaged one:
                the rank fails, and the others are not there to give the weights back with.
        """
        self._exchange()
        try:
            yield
        except also_after:
            self._exchange()
            raise
        self._exchange()

    def _exchange(self) -> None:
        for master, value in zip(masters(self._engine), self._values, strict=True):
            master.data, value.data = value.data, master.data
        publish_masters(self._engine)


def forget_average(engine: DeepSpeedEngine) -> None:
    """Let go what a checkpoint has brought of an average that is kept no longer."""
    for one in engine.optimizer.state.values():
        one.pop(AVERAGE, None)
