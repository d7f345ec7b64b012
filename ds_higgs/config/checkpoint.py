"""`checkpoint`: when to save, what to keep, where to go on."""

from typing import Literal

from pydantic import Field

from ds_higgs.config.section import Section
from ds_higgs.config.types import Count, PathText, Positive


class CheckpointConfig(Section):
    """When to save, what to keep, where to go on."""

    async_: bool = Field(
        False, alias="async", description="Train on while a checkpoint is written, from a copy in CPU memory."
    )
    save_steps: Count = Field(1000, description="Save every this many optimizer steps, and at the end.")
    keep_latest: Count = Field(3, description="Checkpoints kept.")
    keep_gb: Positive | None = Field(
        None, description="GB that kept checkpoints take at most together; the newest and the best stay in any case."
    )
    keep_adapters: Count | None = Field(
        None, description="Adapters of steps kept, the newest; if unset all, or, of whole weights, keep_latest."
    )
    resume: PathText = Field("auto", description="auto: the run's newest complete checkpoint; never; or a path.")
    on_save_error: Literal["stop", "warn"] = Field("stop", description="At a save that fails: stop, or go on.")
