"""`train` and `lora`: which weights are trained."""

import re
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from ds_higgs.config.section import Section
from ds_higgs.config.types import Count, FilePath, Probability, Text

LoraTarget = Literal["attention", "text_ffn", "audio_ffn"]
WholePart = Literal["audio_head", "audio_embeddings", "text_head", "audio_norms", "attention", "text_ffn", "audio_ffn"]
TrainMode = Literal["lora", "audio_path", "full"]


def _check_expression(text: str) -> None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None


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
        _check_expression(only)
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
    modules_to_save: tuple[WholePart, ...] | Text = Field(
        (),
        description="Trained whole and saved with the adapter: parts, or a regular expression over module names.",
    )
    rslora: bool = Field(False, description="Rank-stabilised scaling.")
    dora: bool = Field(False, description="Weight-decomposed LoRA.")

    @field_validator("targets")
    @classmethod
    def _name_something(cls, targets: tuple | dict | str) -> tuple | dict | str:
        if not targets:
            raise ValueError("is empty: expected any of attention, text_ffn, audio_ffn, or a regular expression")
        if isinstance(targets, str):
            _check_expression(targets)
        return targets

    @field_validator("modules_to_save")
    @classmethod
    def _are_not_lora(cls, modules: tuple | str, info: ValidationInfo) -> tuple | str:
        if isinstance(modules, str):
            _check_expression(modules)
            return modules
        targets = info.data.get("targets", ())
        if both := [part for part in modules if not isinstance(targets, str) and part in targets]:
            raise ValueError(f"{', '.join(both)}: in lora.targets too, expected in one of them")
        return modules

    @property
    def trains_whole_layers(self) -> bool:
        """Whether weights of layers are among those trained whole, which are as large as the base's own."""
        return isinstance(self.modules_to_save, str) or bool(set(self.modules_to_save) & set(get_args(LoraTarget)))

    @property
    def highest_rank(self) -> int:
        """Of all paths."""
        return max(self.targets.values()) if isinstance(self.targets, dict) else self.rank
