"""Base checkpoint, what is trained of it, and memory settings to a DeepSpeed engine."""

import random
from collections.abc import Mapping
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

from ds_higgs.adapters.warm_start import start_from
from ds_higgs.config import Config, OptimConfig
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.extensions import loading_extensions
from ds_higgs.job.logs import logger, phase, without_prints
from ds_higgs.model.loading import DTYPES, HiggsAudioModel, load_model
from ds_higgs.model.lora import count_parameters, unwrap
from ds_higgs.model.parts import PATH_NAMES
from ds_higgs.model.patches import apply_patches
from ds_higgs.model.trained import make_trainable
from ds_higgs.model.whole_modules import release_originals
from ds_higgs.training.memory_plan import MemorySettings
from ds_higgs.training.metrics import tolerate_tracker_errors
from ds_higgs.training.optimizers import build_optimizer
from ds_higgs.training.rates import parameter_groups
from ds_higgs.training.reduction import look_for_overflow_at_once
from ds_higgs.training.schedule import count_warmup_steps, learning_rate_factor
from ds_higgs.training.step_module import StepModule


def build_trained_model(
    config: Config,
    base: Path,
    settings: MemorySettings,
    *,
    device: torch.device | str = "cpu",
    start: Path | None = None,
    split_by: Mapping[str, Any] | None = None,
) -> PeftModel | HiggsAudioModel:
    """The base model, of which the weights that require gradients are trained, with the memory patches on it.

    It has the same weights on every rank.

    Args:
        start: what the weights begin with, where that is not the base alone.
        split_by: a DeepSpeed JSON of ZeRO-3: the base is split by it from the start, and every rank calls this.
    """
    seed_everything(config.run.seed)
    with phase("loading the base checkpoint"):
        model = load_model(
            base,
            dtype=DTYPES[config.zero.precision],
            attention="sdpa" if settings.attention == "varlen" else settings.attention,
            allow_fork=config.model.allow_fork,
            quantization=config.model.quantization,
            device=device,
            split_by=split_by,
        )
    if start is not None:
        with phase(f"starting from {start}"):
            model = start_from(model, start, mode=config.train.mode, only=config.train.only)
    trained = make_trainable(model, mode=config.train.mode, only=config.train.only, lora=dict(config.lora))
    if isinstance(trained, PeftModel) and config.loss.keep_base is None:
        release_originals(trained)
    apply_patches(
        unwrap(trained),
        packed_rows=settings.packed_rows,
        kernels=settings.kernels,
        compiled=settings.compiled,
        varlen=settings.attention == "varlen",
        grouped_lora=settings.grouped_lora,
        activation_checkpointing=settings.activation_checkpointing,
    )
    return trained


def build_engine(
    config: Config,
    model: PeftModel | HiggsAudioModel,
    *,
    deepspeed_config: dict[str, Any],
    total_steps: int,
    ranks: Ranks,
) -> DeepSpeedEngine:
    """DeepSpeed around the model: its module is a StepModule, its optimizer sees the trainable weights alone.

    Every call of its `step` is an update: `train_step` accumulates micro-batches itself and reduces them once.
    """
    module = StepModule(model, supervised_heads=config.memory.supervised_text_head, end_weight=config.loss.eos_weight)
    factor = partial(
        learning_rate_factor,
        schedule=config.optim.schedule,
        warmup_steps=count_warmup_steps(config.optim.warmup_steps, total_steps=total_steps),
        total_steps=total_steps,
    )

    def build_scheduler(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, factor)

    with phase("starting DeepSpeed"), loading_extensions(), without_prints():  # it may compile the optimizer
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(config.optim),
            model_parameters=_groups(config.optim, module),
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
        look_for_overflow_at_once(engine)
    seed_everything(config.run.seed + 1 + ranks.rank)  # dropout: other masks on every rank
    return engine


def _groups(optim: OptimConfig, module: StepModule) -> list[Any]:
    return parameter_groups(
        [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad],
        learning_rate=optim.learning_rate,
        whole_learning_rate=optim.whole_learning_rate,
        loraplus_lr_ratio=optim.loraplus_lr_ratio,
        layer_decay=optim.layer_decay,
        num_layers=module.higgs.config.text_config.num_hidden_layers,
    )


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


def log_parameters(model: PeftModel | HiggsAudioModel) -> None:
    """Tell how many parameters there are, and which of them are trained."""
    counts = count_parameters(model)
    parts = {name: counts[name] for name in PATH_NAMES if counts[name]}
    logger.info(
        "%s parameters, %s trainable (%.2f %%): %s",
        f"{counts['total']:,}",
        f"{counts['trainable']:,}",
        100 * counts["trainable"] / counts["total"],
        ", ".join(f"{name} {count:,}" for name, count in parts.items()),
    )
