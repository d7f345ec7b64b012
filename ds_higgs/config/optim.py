"""`optim`: the optimizer, its schedule and the size of a step."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ds_higgs.config.section import Section
from ds_higgs.config.types import Count, CountOrZero, Positive, PositiveOrZero, Probability, read_number


class OptimConfig(Section):
    """The optimizer and its schedule."""

    type: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw", description="adamw_8bit: moments in 8 bits (bitsandbytes, CUDA); muon: DeepSpeed's, for whole weights."
    )
    learning_rate: Positive = Field(2e-4, description="Peak learning rate.")
    adam_learning_rate: Positive | None = Field(
        None,
        description="Muon: peak rate of AdamW, which trains embeddings, heads and norms; learning_rate if unset.",
    )
    muon_momentum: Probability = Field(0.95, description="Muon's momentum.")
    whole_learning_rate: Positive | None = Field(
        None, description="Peak rate of what lora.modules_to_save trains whole; learning_rate if unset."
    )
    loraplus_lr_ratio: Positive = Field(1.0, description="LoRA+: rate of LoRA's B over that of A; 16 is usual.")
    layer_decay: Annotated[float, Field(gt=0, le=1), BeforeValidator(read_number)] = Field(
        1.0, description="Factor of the rate from each layer to the one below it; 0.9 is usual with train.mode full."
    )
    weight_decay: PositiveOrZero = Field(0.01, description="Decoupled weight decay.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.999), description="Adam's decay rates.")
    eps: Positive = Field(1e-8, description="Adam's epsilon.")
    warmup_steps: CountOrZero | Literal["auto"] = Field(
        "auto", description="Optimizer steps of linear warm-up; auto: 3 % of the run's."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after warm-up, to 0.")
    ema_decay: Annotated[float, Field(gt=0, lt=1), BeforeValidator(read_number)] | None = Field(
        None, description="Keep an exponential moving average of the trained weights with this decay; 0.999 is usual."
    )
    max_grad_norm: PositiveOrZero = Field(1.0, description="Clip the global gradient norm to this; 0: no clipping.")
    gradient_accumulation_steps: Count = Field(1, description="Micro-batches per GPU in one optimizer step.")
    global_batch_size: Count | None = Field(
        None, description="Samples in a step, of all GPUs; batch_size and accumulation follow from what fits them."
    )

    @model_validator(mode="after")
    def _muon_is_alone(self) -> "OptimConfig":
        if self.type != "muon":
            if self.adam_learning_rate is not None:
                raise ValueError("adam_learning_rate is for type muon: expected learning_rate alone")
            return self
        if self.max_grad_norm != 0:
            raise ValueError(
                "type muon needs max_grad_norm 0: DeepSpeed would clip the update, which Muon has made of one size"
            )
        if self.layer_decay != 1:
            raise ValueError("type muon has one rate for all layers: leave out layer_decay")
        return self

    @model_validator(mode="after")
    def _one_size_of_a_step(self) -> "OptimConfig":
        if self.global_batch_size is not None and self.gradient_accumulation_steps > 1:
            raise ValueError("global_batch_size and gradient_accumulation_steps are both set: expected one of them")
        return self
