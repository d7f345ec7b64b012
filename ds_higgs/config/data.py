"""`data`: manifests, codes and batches."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ds_higgs.config.section import Section
from ds_higgs.config.sources import TrainSource, ValSource, check_train_sources, check_val_sources
from ds_higgs.config.types import Count, CountOrZero, FilePath, PathText, Probability, Seconds, SecondsOrZero

AutoOrBool = Literal["auto"] | bool


class DataConfig(Section):
    """Manifests, codes and batches."""

    train_manifest: FilePath | None = Field(None, description="JSON array or JSON lines of ChatML samples.")
    val_manifest: FilePath | None = Field(None, description="The same, for validation.")
    train: tuple[TrainSource, ...] = Field(
        (),
        description="Several manifests instead of train_manifest: "
        "{manifest, weight, epochs, prompt_form, reference, name}.",
    )
    val: tuple[ValSource, ...] = Field(
        (), description="Several manifests instead of val_manifest: {manifest, weight, name}."
    )
    audio_root: FilePath | None = Field(
        None, description="Where relative audio paths start; default: beside the manifest."
    )
    audio: Literal["here", "elsewhere"] = Field(
        "here", description="elsewhere: no recordings on this machine; their codes are used and nothing looks for them."
    )
    cache_dir: FilePath | None = Field(
        None, description="Code cache, shared by runs; ~/.cache/ds_higgs/codes if unset."
    )
    codec: PathText | None = Field(None, description="Codec folder or hub id; the base checkpoint's own if unset.")
    batch_size: Count = Field(2, description="Samples in a micro-batch, per GPU.")
    max_tokens: Count | Literal["auto"] | None = Field(
        None,
        description="Expanded positions in a micro-batch, padding included; replaces batch_size. "
        "auto: as many as fit the device by the estimate.",
    )
    num_workers: CountOrZero = Field(2, description="Collation processes per GPU.")
    on_bad_sample: Literal["error", "skip"] = Field(
        "error", description="At a sample that cannot be trained on: report and stop, or leave it out."
    )
    exclude: FilePath | None = Field(
        None, description="List of samples to leave out, a name such as train.json:3 a line; see `ds-higgs inspect`."
    )
    max_audio_s: Seconds = Field(30.0, description="Longest audio clip, in seconds.")
    min_audio_s: SecondsOrZero = Field(0.2, description="Shortest audio clip, in seconds.")
    short_times: Count = Field(1, description="How many times an epoch has each sample whose speech is short.")
    short_s: Seconds = Field(3.0, description="Speech below this is short, in seconds.")
    reference_turn: Literal["as_is", "assistant"] = Field(
        "as_is", description="Move a user message's reference audio into an earlier assistant turn."
    )
    prompt_form: Literal["as_is", "boson", "mixed"] = Field(
        "as_is", description="As the manifest has it; as servers ask for speech; or half an epoch's samples in each."
    )
    reference: Literal["as_is", "redraw"] = Field(
        "as_is", description="As the manifest has it; or another clip of the same speaker, drawn anew every epoch."
    )
    drop_reference: Probability = Field(
        0.0, description="Share of the samples that lack their reference and what it says, another in every epoch."
    )
    drop_reference_text: Probability = Field(0.0, description="The same, of what the reference says alone.")
    drop_system: Probability = Field(0.0, description="The same, of the system message.")
    use_delay_pattern: AutoOrBool = Field("auto", description="auto: as the base checkpoint says.")
    encode_whisper_embed: AutoOrBool = Field("auto", description="auto: as the base checkpoint says.")

    @field_validator("train_manifest", "val_manifest", mode="before")
    @classmethod
    def _is_one(cls, manifest: Any, field: ValidationInfo) -> Any:
        if isinstance(manifest, list | tuple):
            several = str(field.field_name).removesuffix("_manifest")
            raise ValueError(f"it is one manifest: expected several as a list of sources in data.{several}")
        return manifest

    @field_validator("train")
    @classmethod
    def _can_be_mixed(cls, train: tuple[TrainSource, ...]) -> tuple[TrainSource, ...]:
        if train:
            check_train_sources(train)
        return train

    @field_validator("val")
    @classmethod
    def _can_be_measured(cls, val: tuple[ValSource, ...]) -> tuple[ValSource, ...]:
        if val:
            check_val_sources(val)
        return val

    @model_validator(mode="after")
    def _each_in_one_form(self) -> "DataConfig":
        if not self.train_sources:
            raise ValueError("nothing to train on: expected train_manifest, or several sources in train")
        for one, several in (("train_manifest", "train"), ("val_manifest", "val")):
            if getattr(self, one) is not None and getattr(self, several):
                raise ValueError(f"{one} and {several} are both set: expected one of them")
        return self

    @property
    def train_sources(self) -> tuple[TrainSource, ...]:
        """What is trained on, in either form."""
        return self.train if self.train_manifest is None else (TrainSource(manifest=self.train_manifest),)

    @property
    def val_sources(self) -> tuple[ValSource, ...]:
        """What is validated on, in either form."""
        return self.val if self.val_manifest is None else (ValSource(manifest=self.val_manifest),)

    @property
    def manifests(self) -> tuple[Path, ...]:
        """All of them, those for training first."""
        return tuple(source.manifest for source in (*self.train_sources, *self.val_sources))

    @model_validator(mode="after")
    def _some_length_is_allowed(self) -> "DataConfig":
        if self.min_audio_s > self.max_audio_s:
            raise ValueError(f"min_audio_s {self.min_audio_s:g} is above max_audio_s {self.max_audio_s:g}")
        return self
