"""`zero`: what DeepSpeed does."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from ds_higgs.config.section import Section
from ds_higgs.config.types import Count, FreeSettings, find_not_finite, read_number

SECRET_NAME = re.compile(r"(^|_)(api_?key|token|secret|password)$", re.IGNORECASE)


class ZeroConfig(Section):
    """What DeepSpeed does."""

    stage: Annotated[Literal[0, 1, 2, 3, "auto"], BeforeValidator(read_number)] = Field(
        2, description="ZeRO stage. auto: 2, or 3 where the estimate says that 2 does not fit the device."
    )
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Of weights and activations.")
    offload_optimizer: bool = Field(False, description="Keep master weights and moments in CPU memory (stage 1 to 3).")
    overlap_comm: bool = Field(False, description="Reduce on a second stream; gains little at LoRA's sizes.")
    reduce_bucket_size: Count = Field(50_000_000, description="Elements of a reduction bucket.")
    allgather_bucket_size: Count = Field(50_000_000, description="Elements of an all-gather bucket.")
    fp32_reduction: bool = Field(True, description="Reduce and hold reduced gradients in fp32.")
    extra: FreeSettings = Field(default_factory=dict, description="Any DeepSpeed key; merged last.")

    @property
    def stage_number(self) -> int:
        """The stage; where auto is not decided yet, the one that is tried first."""
        return 2 if self.stage == "auto" else self.stage

    @field_validator("extra")
    @classmethod
    def _holds_no_secret(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if secrets := sorted(_find_secrets(extra, "")):
            # A type of its own: the message must not show what was found.
            raise PydanticCustomError(
                "secret",
                "{keys}: looks like a key or a password, and the run's folder would keep it; "
                "expected it in the tracker's environment variable (WANDB_API_KEY, COMET_API_KEY)",
                {"keys": ", ".join(secrets)},
            )
        return extra

    @field_validator("extra")
    @classmethod
    def _can_be_json(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if wrong := sorted(find_not_finite(extra)):
            raise ValueError(f"expected numbers that are finite at {', '.join(wrong)}")
        return extra


def _find_secrets(value: Any, path: str) -> Iterator[str]:
    """Dotted paths inside `zero.extra` whose name says that their value is secret."""
    if isinstance(value, dict):
        for key, child in value.items():
            if SECRET_NAME.search(str(key)) and child:
                yield f"{path}{key}"
            yield from _find_secrets(child, f"{path}{key}.")
