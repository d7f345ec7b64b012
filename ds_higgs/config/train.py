"""`train` and `lora`: which weights are trained."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from ds_higgs.config.section import Section
from ds_higgs.config.types import Count, FilePath, Probability, Text

LoraTarget = Literal["attention", "text_ffn", "audio_ffn"]
SavedModule = Literal["audio_head", "audio_embeddings", "text_head"]
TrainMode = Literal["lora", "audio_path", "full"]


class TrainConfig(Section):
    """Which weights are trained."""

    mode: TrainMode = Field(
        "lora", description="LoRA beside the frozen base, the weights of the audio path, or all that the base uses."
    )
    only: Text | None = Field(
        None, description="Regular expression over whole weight names: of the mode's weights, train these alone."
    )

    from_: FilePath | None = Field(
        None,
        alias="from",
        description="Begin with what this run, checkpoint, adapter (merged first) or exported model has learned.",
    )

    @field_validator("from_")
    @classmethod
    def _trains_whole_weights(cls, from_: Path | None, info: ValidationInfo) -> Path | None:
        if from_ is not None and info.data.get("mode") == "lora":
            raise ValueError(
                "is for train.mode audio_path and full; for LoRA on top of it: ds-higgs export PATH --merge --out DIR, "
                "then model.base: DIR"
            )
        return from_

    @field_validator("only")
    @classmethod
    def _is_an_expression(cls, only: str | None, info: ValidationInfo) -> str | None:
        if only is None:
            return only
        if info.data.get("mode") == "lora":
            raise ValueError("is for train.mode audio_path and full; lora.targets says what LoRA is put on")
        try:
            re.compile(only)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return only


class LoraConfig(Section):
    """What LoRA is put on (train.mode lora)."""

    rank: Count = Field(16, description="Rank of every LoRA pair.")
    alpha: Count = Field(32, description="LoRA scale: alpha / rank (alpha / sqrt(rank) with rslora).")
    dropout: Probability = Field(0.05, description="Dropout before LoRA's first matrix.")
    targets: tuple[LoraTarget, ...] | dict[LoraTarget, Count] | Text = Field(
        ("attention", "text_ffn", "audio_ffn"),
        description="Paths that get LoRA; {path: rank}; or a regular expression over module names.",
    )
    modules_to_save: tuple[SavedModule, ...] = Field(
        (), description="Modules trained whole and saved with the adapter."
    )
    rslora: bool = Field(False, description="Rank-stabilised scaling.")
    dora: bool = Field(False, description="Weight-decomposed LoRA.")

    @field_validator("targets")
    @classmethod
    def _name_something(cls, targets: tuple | dict | str) -> tuple | dict | str:
        if not targets:
            raise ValueError("is empty: expected any of attention, text_ffn, audio_ffn, or a regular expression")
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"is not a regular expression: {error}") from None
        return targets

    @property
    def highest_rank(self) -> int:
        """Of all paths."""
        return max(self.targets.values()) if isinstance(self.targets, dict) else self.rank
