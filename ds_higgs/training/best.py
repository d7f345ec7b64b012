"""Which of a run's evaluations is the best so far, and since when nothing has been better."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HIGHER_IS_BETTER = frozenset({"code_accuracy", "stop_rate", "speaker_similarity"})


@dataclass
class Best:
    """The best value of one measure; part of every checkpoint.

    measure: None: nothing is looked at.
    patience: evaluations without a better value after which a run has to end; None: it never has to.
    step: at which the best value was reached.
    since: evaluations after it.
    judge: the model that the measure is of, where there is one: values of two are not to be compared.
    weights: what is measured, "trained" or the average, "ema".
    """

    measure: str | None
    patience: int | None
    value: float | None = None
    step: int = 0
    since: int = 0
    judge: str | None = None
    weights: str = "trained"

    def update(self, values: Mapping[str, Any], *, step: int) -> bool:
        """Take in an evaluation; whether it is the best so far. One without a value of the measure does not count."""
        value = values.get(self.measure) if self.measure else None
        if value is None:
            return False
        if math.isfinite(value) and (self.value is None or self._is_better(value, self.value)):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether there has been nothing better for so long that the run has to end."""
        return self.patience is not None and self.since >= self.patience

    def _is_better(self, value: float, than: float) -> bool:
        return value > than if self.measure in HIGHER_IS_BETTER else value < than

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; from nothing, where that went by another measure or judge, or by other weights."""
        before = (state["measure"], state.get("judge"), state.get("weights", "trained"))
        if before == (self.measure, self.judge, self.weights):
            self.value, self.step, self.since = state["value"], state["step"], state["since"]
