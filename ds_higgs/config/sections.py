"""The configuration: frozen, validated, the one source of every default."""

import math
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ds_higgs.config.checkpoint import CheckpointConfig
from ds_higgs.config.data import DataConfig
from ds_higgs.config.optim import OptimConfig
from ds_higgs.config.section import Section
from ds_higgs.config.sources import is_endless
from ds_higgs.config.train import LoraConfig, TrainConfig
from ds_higgs.config.types import (
    Count,
    CountOrZero,
    FilePath,
    PathText,
    Positive,
    PositiveOrZero,
    Seconds,
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
    "word_error_rate",
    "character_error_rate",
    "speaker_similarity",
]
# Measures that take a judge, and the key of eval that names it.
_JUDGED_BY = {
    "word_error_rate": "asr",
    "character_error_rate": "asr",
    "speaker_similarity": "speaker_model",
}


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
    quantization: Literal["nf4", "fp8"] | None = Field(
        None, description="nf4: hold the frozen base in 4 bits (bitsandbytes). fp8: an experiment, its products in fp8."
    )


class KeepBaseConfig(Section):
    """How far the model may go from its base."""

    weight: Positive = Field(description="Factor of the divergence from the base, in the loss.")
    on: Literal["text", "audio", "all"] = Field("all", description="Which targets' predictions it is taken on.")
    sources: tuple[Text, ...] | None = Field(
        None, description="Names of the sources of data.train that it is taken on; all if unset."
    )

    @property
    def on_text(self) -> bool:
        """Whether it is taken on text targets."""
        return self.on in ("text", "all")

    @property
    def on_audio(self) -> bool:
        """Whether it is taken on audio targets."""
        return self.on in ("audio", "all")


class LossConfig(Section):
    """How the two streams add up."""

    text_weight: PositiveOrZero = Field(1.0, description="Factor of text_loss.")
    audio_weight: PositiveOrZero = Field(1.0, description="Factor of audio_loss.")
    codebook_weights: Literal["equal", "falling", "first"] | tuple[PositiveOrZero, ...] | None = Field(
        None,
        description="One per codebook, normalised to sum 1, or a preset for 8: falling (8,8,6,6,4,4,2,2), "
        "first (8,1,1,1,1,1,1,1). Equal if unset.",
    )
    eos_weight: PositiveOrZero = Field(1.0, description="Factor of the loss where speech ends, in training.")
    keep_base: KeepBaseConfig | None = Field(
        None, description="Add the divergence KL(base || model) to the loss: {weight, on, sources}."
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossConfig":
        if self.text_weight == self.audio_weight == 0:
            raise ValueError("text_weight and audio_weight are both 0: nothing would be learned")
        if isinstance(self.codebook_weights, tuple) and not 0 < sum(self.codebook_weights) < math.inf:
            raise ValueError("codebook_weights have no sum to divide by: expected numbers of which one is above 0")
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
    attention: Literal["auto", "sdpa", "flash_attention_2", "varlen"] = Field(
        "auto", description="auto: sdpa. varlen: torch's FlashAttention without padding, with packed rows, on CUDA."
    )


class EvalConfig(Section):
    """Validation."""

    eval_steps: Count = Field(500, description="Validate every this many optimizer steps, before and at the end.")
    max_batches: Count | None = Field(None, description="Validation micro-batches per GPU; all if unset.")
    num_audio_samples: CountOrZero = Field(0, description="Validation prompts to speak and save as WAV.")
    audio_every: Count | None = Field(
        None, description="Speak every this many optimizer steps; at every validation if unset."
    )
    max_audio_s: Seconds = Field(20.0, description="Longest spoken sample, in seconds.")
    weights: Literal["trained", "ema"] = Field(
        "trained", description="What is evaluated and kept as adapters/best: the weights, or optim.ema_decay's average."
    )
    asr: PathText | None = Field(
        None, description="Speech recogniser of transformers, folder or hub id: error rates of the spoken samples."
    )
    language: Text | None = Field(
        None, description="Language that a multilingual Whisper model hears, such as arabic; it guesses if unset."
    )
    speaker_model: PathText | None = Field(
        None, description="X-vector model of transformers, folder or hub id: how like the voices are."
    )
    judge_device: Literal["auto", "cpu"] = Field(
        "auto", description="Where both listen; auto: on the GPU, and in CPU memory between evaluations."
    )
    best_by: BestMeasure | None = Field(
        None, description="Keep adapters/best by this measure: a validation loss, or one of the spoken samples."
    )
    patience: Count | None = Field(
        None, description="Stop after this many evaluations in a row without a better value of best_by."
    )

    @model_validator(mode="after")
    def _judges_have_work(self) -> "EvalConfig":
        for key in ("asr", "speaker_model"):
            if getattr(self, key) is not None and not self.num_audio_samples:
                raise ValueError(f"{key} needs num_audio_samples: there is nothing to listen to")
        if self.language is not None and self.asr is None:
            raise ValueError("language needs asr: it is what the recogniser hears")
        wanted = _JUDGED_BY.get(self.best_by or "")
        if wanted is not None and getattr(self, wanted) is None:
            raise ValueError(f"best_by {self.best_by} needs {wanted}: a model that judges")
        return self

    @property
    def best_judge(self) -> str | None:
        """What decides values of best_by beside the model that is trained: a judge's name, and its language."""
        judge = _JUDGED_BY.get(self.best_by or "")
        if judge is None:
            return None
        name = getattr(self, judge)
        return f"{name}, {self.language}" if judge == "asr" and self.language else name


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
        large = self.train.mode != "lora" or self.lora.trains_whole_layers
        return self.checkpoint.keep_adapters or (self.checkpoint.keep_latest if large else None)

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
        model = info.data.get("model")
        by_name = not isinstance(lora.modules_to_save, str)  # what an expression matches is known with the model
        if model is not None and model.quantization is not None and by_name and lora.trains_whole_layers:
            raise ValueError("modules_to_save trains layers, whose weights are in 4 bits: leave out model.quantization")
        return lora

    @field_validator("loss")
    @classmethod
    def _base_is_there(cls, loss: LossConfig, info: ValidationInfo) -> LossConfig:
        train, data = info.data.get("train"), info.data.get("data")
        if loss.keep_base is None or train is None or data is None:
            return loss
        if train.mode != "lora":
            raise ValueError(
                f"keep_base needs train.mode lora: {train.mode} trains the base itself, and keeps no other"
            )
        unknown = set(loss.keep_base.sources or ()) - {source.title for source in data.train}
        if unknown:
            raise ValueError(f"keep_base.sources: {', '.join(sorted(unknown))}: no source of data.train is named so")
        return loss

    @field_validator("optim")
    @classmethod
    def _has_a_lora_b(cls, optim: OptimConfig, info: ValidationInfo) -> OptimConfig:
        train = info.data.get("train")
        if train is not None and train.mode != "lora" and optim.loraplus_lr_ratio != 1:
            raise ValueError(f"train.mode {train.mode} has no LoRA: leave out loraplus_lr_ratio")
        if train is not None and train.mode == "lora" and optim.type == "muon":
            raise ValueError("type muon is for train.mode audio_path and full: LoRA's thin matrices are not for it")
        lora = info.data.get("lora")
        if optim.whole_learning_rate is not None and lora is not None and not lora.modules_to_save:
            raise ValueError("whole_learning_rate is for what lora.modules_to_save trains whole, and there is none")
        return optim

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
    def _zero_is_sound(cls, zero: ZeroConfig, info: ValidationInfo) -> ZeroConfig:
        loss = info.data.get("loss")
        if zero.stage == 3 and loss is not None and loss.keep_base is not None:
            raise ValueError("loss.keep_base needs stage 0, 1 or 2: stage 3 splits the base that it asks")
        if zero.stage == 0 and zero.offload_optimizer:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 does not split the optimizer")
        optim = info.data.get("optim")
        if zero.offload_optimizer and optim is not None and optim.type == "adamw_8bit":
            raise ValueError("offload_optimizer has the moments on the CPU, and optim.type adamw_8bit on the GPU")
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
        if has_samples and data is not None and not data.val_sources:
            raise ValueError("num_audio_samples needs data.val_manifest: the prompts come from there")
        optim = info.data.get("optim")
        if value.weights == "ema" and optim is not None and optim.ema_decay is None:
            raise ValueError("weights ema needs optim.ema_decay: there is no average without it")
        return value
