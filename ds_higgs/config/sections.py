"""The configuration: frozen, validated, the one source of every default."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ds_higgs.config.section import Section
from ds_higgs.config.sources import TrainSource, ValSource, check_train_sources, check_val_sources, is_endless
from ds_higgs.config.train import LoraConfig, TrainConfig
from ds_higgs.config.types import (
    Count,
    CountOrZero,
    FilePath,
    PathText,
    Positive,
    PositiveOrZero,
    Probability,
    Seconds,
    SecondsOrZero,
    Seed,
    Text,
)
from ds_higgs.config.zero import ZeroConfig

BestMeasure = Literal[
    "loss",
    "text_loss",
    "audio_loss",
    "code_accuracy",
    "stop_rate",
    "silence_share",
    "mel_cepstral_distance",
]
AutoOrBool = Literal["auto"] | bool


class RunConfig(Section):
    """What a run is and when it ends."""

    output_dir: FilePath = Field(description="Folder that the run writes; made where it is missing.")
    seed: Seed = Field(0, description="Seed of LoRA's initial weights, dropout and the order of samples.")
    epochs: Count = Field(1, description="Passes over the training data; of a mixture, times each source's own.")
    max_steps: Count | None = Field(None, description="Stop after this many optimizer steps, if sooner.")
    deterministic: bool = Field(False, description="Refuse CUDA kernels whose results differ from run to run.")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="At a NaN or infinite loss or gradient: stop the run, or leave that update out."
    )


class ModelConfig(Section):
    """The base checkpoint."""

    base: PathText = Field(description="Folder or hub id of the base checkpoint.")
    revision: Text | None = Field(
        None, description="Hub revision; for the released repository, by default the last one in the original format."
    )
    allow_fork: bool = Field(False, description="Accept a boson_multimodal whose forward computes losses itself.")
    quantization: Literal["nf4"] | None = Field(None, description="Hold the frozen base in 4 bits (bitsandbytes).")


class DataConfig(Section):
    """Manifests, codes and batches."""

    train_manifest: FilePath | None = Field(None, description="JSON array or JSON lines of ChatML samples.")
    val_manifest: FilePath | None = Field(None, description="The same, for validation.")
    train: tuple[TrainSource, ...] = Field(
        (), description="Several manifests instead of train_manifest: {manifest, weight, epochs, prompt_form, name}."
    )
    val: tuple[ValSource, ...] = Field(
        (), description="Several manifests instead of val_manifest: {manifest, weight, name}."
    )
    audio_root: FilePath | None = Field(
        None, description="Where relative audio paths start; default: beside the manifest."
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
    drop_reference: Probability = Field(
        0.0, description="Share of the samples that lack their reference and what it says, another in every epoch."
    )
    drop_reference_text: Probability = Field(0.0, description="The same, of what the reference says alone.")
    drop_system: Probability = Field(0.0, description="The same, of the system message.")
    use_delay_pattern: AutoOrBool = Field("auto", description="auto: as the base checkpoint says.")
    encode_whisper_embed: AutoOrBool = Field("auto", description="auto: as the base checkpoint says.")

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


class LossConfig(Section):
    """How the two streams add up."""

    text_weight: PositiveOrZero = Field(1.0, description="Factor of text_loss.")
    audio_weight: PositiveOrZero = Field(1.0, description="Factor of audio_loss.")
    codebook_weights: tuple[PositiveOrZero, ...] | None = Field(
        None, description="One per codebook, normalised to sum 1; equal if unset."
    )
    eos_weight: PositiveOrZero = Field(1.0, description="Factor of the loss where speech ends, in training.")

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossConfig":
        if self.text_weight == self.audio_weight == 0:
            raise ValueError("text_weight and audio_weight are both 0: nothing would be learned")
        if self.codebook_weights is not None and not 0 < sum(self.codebook_weights) < math.inf:
            raise ValueError("codebook_weights have no sum to divide by: expected numbers of which one is above 0")
        return self


class OptimConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Positive = Field(2e-4, description="Peak learning rate.")
    weight_decay: PositiveOrZero = Field(0.01, description="Decoupled weight decay.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.999), description="Adam's decay rates.")
    eps: Positive = Field(1e-8, description="Adam's epsilon.")
    warmup_steps: CountOrZero = Field(0, description="Optimizer steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after warm-up, to 0.")
    max_grad_norm: PositiveOrZero = Field(1.0, description="Clip the global gradient norm to this; 0: no clipping.")
    gradient_accumulation_steps: Count = Field(1, description="Micro-batches per GPU in one optimizer step.")
    global_batch_size: Count | None = Field(
        None, description="Samples in a step, of all GPUs; batch_size and accumulation follow from what fits them."
    )

    @model_validator(mode="after")
    def _one_size_of_a_step(self) -> "OptimConfig":
        if self.global_batch_size is not None and self.gradient_accumulation_steps > 1:
            raise ValueError("global_batch_size and gradient_accumulation_steps are both set: expected one of them")
        return self


class MemoryConfig(Section):
    """Time against memory."""

    activation_checkpointing: Literal["auto", "none", "full"] | Count = Field(
        "auto", description="Which decoder layers are computed again in the backward pass; N: every N-th."
    )
    supervised_text_head: bool = Field(True, description="Run the heads only where a label stands.")
    packed_rows: bool = Field(
        True, description="Lay text and audio rows out once per batch: no padding, no waiting inside the layers."
    )
    grouped_lora: bool = Field(
        True, description="LoRA of projections that share an input as one operation with one dropout."
    )
    kernels: Literal["auto", "plain", "torch", "liger"] = Field(
        "auto", description="Norm, SwiGLU, rotary. auto: liger where installed, on CUDA; plain: the model's own."
    )
    compile: Literal["auto", "off"] = Field("auto", description="auto: torch.compile torch's kernels, on CUDA.")
    attention: Literal["auto", "sdpa", "flash_attention_2"] = Field("auto", description="Attention implementation.")


class CheckpointConfig(Section):
    """When to save, what to keep, where to go on."""

    save_steps: Count = Field(1000, description="Save every this many optimizer steps, and at the end.")
    keep_latest: Count = Field(3, description="Checkpoints kept.")
    keep_adapters: Count | None = Field(
        None, description="Adapters of steps kept, the newest; if unset all, or, of whole weights, keep_latest."
    )
    resume: PathText = Field("auto", description="auto: the run's newest complete checkpoint; never; or a path.")
    on_save_error: Literal["stop", "warn"] = Field("stop", description="At a save that fails: stop, or go on.")


class EvalConfig(Section):
    """Validation."""

    eval_steps: Count = Field(500, description="Validate every this many optimizer steps, before and at the end.")
    max_batches: Count | None = Field(None, description="Validation micro-batches per GPU; all if unset.")
    num_audio_samples: CountOrZero = Field(0, description="Validation prompts to speak and save as WAV.")
    audio_every: Count | None = Field(
        None, description="Speak every this many optimizer steps; at every validation if unset."
    )
    max_audio_s: Seconds = Field(20.0, description="Longest spoken sample, in seconds.")
    best_by: BestMeasure | None = Field(
        None, description="Keep adapters/best by this measure: a validation loss, or one of the spoken samples."
    )
    patience: Count | None = Field(
        None, description="Stop after this many evaluations in a row without a better value of best_by."
    )


class LoggingConfig(Section):
    """What is shown and recorded."""

    log_steps: Count = Field(10, description="Optimizer steps between lines on screen and in the trackers.")
    progress: bool = Field(True, description="Progress bar on rank 0.")
    tensorboard: bool = Field(True, description="TensorBoard events in OUTPUT_DIR/tensorboard.")
    wandb: Text | None = Field(None, description="Weights & Biases project; needs the wandb package.")
    comet: Text | None = Field(None, description="Comet project; needs the comet_ml package.")
    csv: bool = Field(False, description="CSV files in OUTPUT_DIR/csv.")
    profile_steps: CountOrZero = Field(0, description="Trace so many steps from the third on, in OUTPUT_DIR/profile.")

    @classmethod
    def silent(cls) -> "LoggingConfig":
        """No tracker and no progress bar: for runs that only measure."""
        return cls(log_steps=1, progress=False, tensorboard=False, wandb=None, comet=None, csv=False)


class Config(Section):
    """Everything a run depends on."""

    run: RunConfig
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = Field(default_factory=dict, validate_default=True)  # type: ignore[arg-type]
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    zero: ZeroConfig = ZeroConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    logging: LoggingConfig = LoggingConfig()

    @field_validator("data")
    @classmethod
    def _has_an_end(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        run = info.data.get("run")
        if data.train and is_endless(data.train) and run is not None and run.max_steps is None:
            raise ValueError("no source of data.train has epochs, so the run has no end: expected run.max_steps")
        return data

    @property
    def kept_adapters(self) -> int | None:
        """checkpoint.keep_adapters, or what it is where it is unset; None: all."""
        unset = None if self.train.mode == "lora" else self.checkpoint.keep_latest
        return self.checkpoint.keep_adapters or unset

    @field_validator("train")
    @classmethod
    def _base_can_be_trained(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        model = info.data.get("model")
        if train.mode != "lora" and model is not None and model.quantization is not None:
            raise ValueError(f"mode {train.mode} trains the base's own weights: leave out model.quantization")
        return train

    @field_validator("lora")
    @classmethod
    def _lora_is_trained(cls, lora: LoraConfig, info: ValidationInfo) -> LoraConfig:
        train = info.data.get("train")
        changed = [key for key, value in lora if value != getattr(LoraConfig(), key)]
        if train is not None and train.mode != "lora" and changed:
            raise ValueError(f"train.mode {train.mode} has no LoRA: leave out {', '.join(changed)}")
        return lora

    @field_validator("optim")
    @classmethod
    def _batches_are_cut_one_way(cls, optim: OptimConfig, info: ValidationInfo) -> OptimConfig:
        data = info.data.get("data")
        if optim.global_batch_size is not None and data is not None and data.max_tokens is not None:
            raise ValueError("global_batch_size and data.max_tokens are both set: expected one of them")
        if optim.global_batch_size is not None and data is not None and data.train:
            raise ValueError("global_batch_size needs data.train_manifest: for a mixture set data.batch_size")
        return optim

    @field_validator("zero")
    @classmethod
    def _zero_is_sound(cls, zero: ZeroConfig) -> ZeroConfig:
        if zero.stage == 0 and zero.offload_optimizer:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 does not split the optimizer")
        return zero

    @field_validator("eval")
    @classmethod
    def _can_be_done(cls, value: EvalConfig, info: ValidationInfo) -> EvalConfig:
        if value.patience is not None and value.best_by is None:
            raise ValueError("patience needs best_by: better by what?")
        has_samples = value.num_audio_samples > 0
        if value.best_by is not None and not value.best_by.endswith("loss") and not has_samples:
            raise ValueError(f"best_by {value.best_by} needs num_audio_samples: it is measured on spoken samples")
        data = info.data.get("data")
        if value.best_by is not None and data is not None and not data.val_sources:
            raise ValueError("best_by needs data.val_manifest")
        if not has_samples:
            return value
        data, zero = info.data.get("data"), info.data.get("zero")
        if data is not None and not data.val_sources:
            raise ValueError("num_audio_samples needs data.val_manifest: the prompts come from there")
        if zero is not None and zero.stage == 3:
            raise ValueError(
                "num_audio_samples needs zero.stage 2 or below: with stage 3 no rank has a whole model to speak with; "
                "listen to a checkpoint with `ds-higgs evaluate`"
            )
        return value
