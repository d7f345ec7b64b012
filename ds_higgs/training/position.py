"""How far a run is: part of every checkpoint, and what the records of its adapters are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ds_higgs.adapters.record import LOSSES


@dataclass
class Position:
    """What a run has done so far.

    skipped_steps: without an update, for a loss or gradient that was not finite.
    audio_targets_seen: None where the run went on from a checkpoint that did not count them.
    validation_loss: of the last validation.
    validation_due, listening_due: at this step; a stop puts them off until the run goes on.
    losses: by name, of the last validation; of the last step where there was none.
    """

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    audio_targets_seen: int | None = 0
    skipped_steps: int = 0
    validation_loss: float | None = None
    validation_due: bool = False
    listening_due: bool = False
    losses: dict[str, float] = field(default_factory=dict)
    losses_are_of: Literal["validation", "training"] = "training"

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Position":
        """The position in a checkpoint, of an earlier version too."""
        return cls(**{"audio_targets_seen": None, **state})

    def advance(self, *, samples: int, tokens: int, audio_targets: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.samples_seen += samples
        self.tokens_seen += tokens
        if self.audio_targets_seen is not None:
            self.audio_targets_seen += audio_targets

    def remember_losses(self, values: Mapping[str, Any], of: Literal["validation", "training"]) -> None:
        """Keep the losses of a validation; those of a step only where there was no validation."""
        if of == "training" and self.losses_are_of == "validation":
            return
        self.losses = {name: values[name] for name in LOSSES}
        self.losses_are_of = of
        if of == "validation":
            self.validation_loss = values["loss"]

    def events_due(self) -> set[str]:
        """The events in metrics.jsonl of what is due: what it holds of them at this step does not count."""
        due = {"eval": self.validation_due, "sample": self.listening_due, "listening": self.listening_due}
        return {event for event, is_due in due.items() if is_due}
