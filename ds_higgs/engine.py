"""Base checkpoint, LoRA and memory settings to a DeepSpeed engine."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ds_higgs.config import Config, MemoryConfig
from ds_higgs.distributed import Ranks
from ds_higgs.model.kernels import choose_attention, choose_kernels
from ds_higgs.model.loading import load_model
from ds_higgs.model.lora import apply_lora, unwrap
from ds_higgs.model.patches import apply_patches
from ds_higgs.model.quantization import check_quantization
from ds_higgs.schedule import learning_rate_factor
from ds_higgs.train_step import StepModule

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_lora_model(config: Config, base: Path) -> PeftModel:
    """The base model with LoRA on it, on the CPU; the same weights on every rank, from `run.seed`."""
    quantization = None if config.model.quantization == "none" else config.model.quantization
    check_quantization(quantization, device_type=device_type(), zero_stage=config.zero.stage)
    dtype = DTYPES[config.zero.precision]
    seed_everything(config.run.seed)
    model = load_model(
        base,
        dtype=dtype,
        attention=choose_attention(config.memory.attention, device_type=device_type(), dtype=dtype),
        allow_fork=config.model.allow_fork,
        quantization=quantization,
    )
    lora = config.lora
    return apply_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        modules_to_save=lora.modules_to_save,
        rslora=lora.rslora,
        dora=lora.dora,
    )


def apply_memory_settings(model: PeftModel, memory: MemoryConfig) -> None:
    """Patch the model's layers as `memory` asks; results stay the same, up to rounding."""
    policy = memory.activation_checkpointing
    every = {"none": None, "full": 1, "auto": 1}[policy] if isinstance(policy, str) else policy
    apply_patches(
        unwrap(model),
        packed_rows=memory.packed_rows,
        kernels=choose_kernels(memory.kernels, device_type=device_type()),
        activation_checkpointing=every,
    )


def device_type() -> str:
    """Of the device that this process trains on: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_engine(
    config: Config, model: PeftModel, *, deepspeed_config: dict[str, Any], total_steps: int, ranks: Ranks
) -> DeepSpeedEngine:
    """DeepSpeed around the LoRA model: its module is a StepModule, its optimizer sees the trainable weights alone.

    Every call of its `step` is an update: `train_step` accumulates micro-batches itself and reduces them once.
    """
    module = StepModule(model, supervised_heads=config.memory.supervised_text_head)
    factor = partial(
        learning_rate_factor,
        schedule=config.optim.schedule,
        warmup_steps=config.optim.warmup_steps,
        total_steps=total_steps,
    )

    def build_scheduler(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, factor)

    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
        config=deepspeed_config,
        lr_scheduler=build_scheduler,
        dist_init_required=False,
    )
    engine.set_gradient_accumulation_boundary(True)
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True  # in fp32 too: no update from a gradient that is not finite
    seed_everything(config.run.seed + 1 + ranks.rank)  # dropout: other masks on every rank
    return engine


def keep_configured_schedule(engine: DeepSpeedEngine, *, learning_rate: float) -> None:
    """After loading a checkpoint: stay at its place in the schedule, with the configured peak rather than its own."""
    scheduler: LambdaLR = engine.lr_scheduler
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    rates: list[float | torch.Tensor] = [
        learning_rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas
    ]
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, the CUDA ones included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
