"""Base checkpoint, LoRA and memory settings to a DeepSpeed engine."""

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.extensions import loading_extensions
from ds_higgs.model.kernels import choose_attention, choose_compiled, choose_kernels
from ds_higgs.model.loading import load_model
from ds_higgs.model.lora import apply_lora, count_parameters, unwrap
from ds_higgs.model.patches import apply_patches
from ds_higgs.model.quantization import check_quantization
from ds_higgs.sizing.estimator import configured_checkpointing, describe_checkpointing, resolve_checkpointing
from ds_higgs.training.metrics import tolerate_tracker_errors
from ds_higgs.training.schedule import learning_rate_factor
from ds_higgs.training.train_step import StepModule

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class MemorySettings:
    """The memory section, with every `auto` decided and everything checked that can be before weights are read."""

    attention: str
    kernels: str
    compiled: bool
    packed_rows: bool
    grouped_lora: bool
    activation_checkpointing: int | None


def choose_memory_settings(config: Config, *, device_type: str) -> MemorySettings:
    """Decide what `auto` means on this device; checkpointing, which depends on the data too, is every layer's for now.

    Raises:
        UserError: for kernels, attention or quantization that cannot work here.
    """
    check_quantization(config.model.quantization, device_type=device_type, zero_stage=config.zero.stage)
    memory = config.memory
    kernels = choose_kernels(memory.kernels, device_type=device_type)
    return MemorySettings(
        attention=choose_attention(memory.attention, device_type=device_type, dtype=DTYPES[config.zero.precision]),
        kernels=kernels,
        compiled=choose_compiled(memory.compile, kernels=kernels, device_type=device_type),
        packed_rows=memory.packed_rows,
        grouped_lora=memory.grouped_lora,
        activation_checkpointing=configured_checkpointing(config),
    )


def decide_checkpointing(config: Config, settings: MemorySettings, *, longest: int, ranks: Ranks) -> MemorySettings:
    """Decide what `memory.activation_checkpointing: auto` means, once the data is known; gradients do not depend on it.

    Args:
        longest: positions of the longest training sample.
    """
    device = distributed.training_device(ranks)
    every = resolve_checkpointing(
        config,
        longest=longest,
        world_size=ranks.world_size,
        memory_bytes=distributed.memory_bytes(device),
        cuda=device.type == "cuda",
    )
    if config.memory.activation_checkpointing == "auto":
        distributed.logger.info("activation checkpointing: %s", describe_checkpointing(every))
    return replace(settings, activation_checkpointing=every)


def build_lora_model(config: Config, base: Path, settings: MemorySettings) -> PeftModel:
    """The base model with LoRA and the memory patches on it, on the CPU; the same weights on every rank."""
    seed_everything(config.run.seed)
    model = load_model(
        base,
        dtype=DTYPES[config.zero.precision],
        attention=settings.attention,
        allow_fork=config.model.allow_fork,
        quantization=config.model.quantization,
    )
    lora = config.lora
    peft_model = apply_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        modules_to_save=lora.modules_to_save,
        rslora=lora.rslora,
        dora=lora.dora,
    )
    apply_patches(
        unwrap(peft_model),
        packed_rows=settings.packed_rows,
        kernels=settings.kernels,
        compiled=settings.compiled,
        grouped_lora=settings.grouped_lora,
        activation_checkpointing=settings.activation_checkpointing,
    )
    return peft_model


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

    with loading_extensions():  # the optimizer's
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
            config=deepspeed_config,
            lr_scheduler=build_scheduler,
            dist_init_required=False,
        )
    _undo_first_step(engine)
    engine.set_gradient_accumulation_boundary(True)
    if config.checkpoint.on_save_error == "warn":
        tolerate_tracker_errors(engine)
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True  # in fp32 too: no update from a gradient that is not finite
    seed_everything(config.run.seed + 1 + ranks.rank)  # dropout: other masks on every rank
    return engine


def _undo_first_step(engine: DeepSpeedEngine) -> None:
    """Take back the update, on gradients of zero, that DeepSpeed's optimizer of stage 0 in bf16 makes as it is built.

    It would count as the first one in AdamW's bias correction, and has decayed the fp32 weights.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.state.clear()
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.data.copy_(weight.data)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, the CUDA ones included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def log_parameters(model: PeftModel) -> None:
    """Tell how many parameters there are, and which of them are trained."""
    counts = count_parameters(model)
    parts = {name: count for name, count in counts.items() if count and name not in ("base", "total", "trainable")}
    distributed.logger.info(
        "%s parameters, %s trainable (%.2f %%): %s",
        f"{counts['total']:,}",
        f"{counts['trainable']:,}",
        100 * counts["trainable"] / counts["total"],
        ", ".join(f"{name} {count:,}" for name, count in parts.items()),
    )
