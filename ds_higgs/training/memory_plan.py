"""What the configuration asks of memory, made into the estimator's inputs; every `auto` decided."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ds_higgs.config import Config
from ds_higgs.config.sections import MemoryConfig
from ds_higgs.job import distributed
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.logs import logger
from ds_higgs.model.kernels import choose_attention, choose_compiled, choose_kernels
from ds_higgs.model.loading import DTYPES, read_config_only
from ds_higgs.model.parts import TARGETS
from ds_higgs.model.quantization import check_quantization
from ds_higgs.sizing.estimator import Estimator, describe_checkpointing
from ds_higgs.sizing.inputs import BatchShape, Policy
from ds_higgs.sizing.shape import count_trained_parameters, model_shape
from ds_higgs.training.optimizers import check_optimizer


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
        UserError: for kernels, attention, quantization or an optimizer that cannot work here.
    """
    dtype, zero_stage = DTYPES[config.zero.precision], config.zero.stage_number
    check_quantization(config.model.quantization, device_type=device_type, zero_stage=zero_stage, dtype=dtype)
    check_optimizer(config.optim, device_type=device_type)
    memory = config.memory
    kernels = choose_kernels(memory.kernels, device_type=device_type)
    return MemorySettings(
        attention=choose_attention(
            memory.attention,
            device_type=device_type,
            dtype=dtype,
            packed_rows=memory.packed_rows,
        ),
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
        logger.info("activation checkpointing: %s", describe_checkpointing(every))
    return replace(settings, activation_checkpointing=every)


def least_memory_bytes(ranks: Ranks) -> int:
    """Of the smallest of all ranks' devices."""
    own = distributed.memory_bytes(distributed.training_device(ranks))
    return min(int(one) for one in distributed.gather_bytes(str(own).encode()))


def build_estimator(config: Config, *, world_size: int, cuda: bool = True) -> Estimator:
    """For `config`; reads the base checkpoint's config.json, and no weights.

    Raises:
        UserError: for a base that has no config, and LoRA targets that are not in it.
    """
    model_config = read_config_only(config.model.base, config.model.revision)
    train = config.train
    counts = count_trained_parameters(
        model_config,
        mode=train.mode,
        only=train.only,
        lora=dict(config.lora),
        keeps_base=config.loss.keep_base is not None,
    )
    return Estimator(model_shape(model_config), counts, build_policy(config, counts, world_size=world_size, cuda=cuda))


def with_config(estimator: Estimator, config: Config) -> Estimator:
    """For another configuration of the same base, of which the same is trained."""
    machine = estimator.policy
    policy = build_policy(config, estimator.counts, world_size=machine.world_size, cuda=machine.cuda)
    return dataclasses.replace(estimator, policy=policy)


def build_policy(config: Config, counts: Mapping[str, int], *, world_size: int, cuda: bool) -> Policy:
    """What `config` says that memory depends on; checkpointing "auto" is left to the caller.

    Args:
        counts: trained parameters by path, as `count_trained_parameters` has them.
    """
    zero, memory, keep = config.zero, config.memory, config.loss.keep_base
    quantized = config.model.quantization
    grouped = memory.grouped_lora and zero.stage_number < 3 and not config.lora.dora and quantized is None
    return Policy(
        element_bytes=DTYPES[zero.precision].itemsize,
        zero_stage=zero.stage_number,
        world_size=world_size,
        offload_optimizer=zero.offload_optimizer,
        overlap_comm=zero.overlap_comm,
        reduce_bucket_elements=zero.reduce_bucket_size,
        fp32_reduction=zero.fp32_reduction,
        gradient_accumulation_steps=config.optim.gradient_accumulation_steps,
        lora_paths=frozenset(path for path in TARGETS if counts[path] > counts[f"whole_{path}"]),
        whole_paths=frozenset(path for path in TARGETS if counts[f"whole_{path}"]),
        trained_heads=counts["audio_head"] + counts["text_head"],
        lora_rank=config.lora.highest_rank,
        lora_dropout=config.lora.dropout,
        kernels="torch" if memory.kernels == "auto" else memory.kernels,  # Liger's keep as much
        grouped_lora=grouped,
        fused=grouped and memory.packed_rows and _is_compiled(memory, cuda=cuda),
        varlen=memory.attention == "varlen",
        supervised_heads=memory.supervised_text_head,
        keeps_text=keep is not None and keep.on_text,
        keeps_audio=keep is not None and keep.on_audio,
        quantized=quantized,
        optimizer=config.optim.type,
        averaged=config.optim.ema_decay is not None,
        async_saves=config.checkpoint.async_,
        keeps_best=config.eval.best_by is not None,
        cuda=cuda,
    )


def _is_compiled(memory: MemoryConfig, *, cuda: bool) -> bool:
    """Whether torch.compile will make the layers' kernels, as far as this machine can tell."""
    device_type = "cuda" if cuda else "cpu"
    kernels = choose_kernels("auto", device_type=device_type) if memory.kernels == "auto" else memory.kernels
    return choose_compiled(memory.compile, kernels=kernels, device_type=device_type)


def configured_checkpointing(config: Config) -> int | None:
    """`memory.activation_checkpointing` as every N-th layer; "auto" counts as every layer."""
    policy = config.memory.activation_checkpointing
    return policy if isinstance(policy, int) else {"none": None, "full": 1, "auto": 1}[policy]


def resolve_checkpointing(
    config: Config, *, longest: int, world_size: int, memory_bytes: int, cuda: bool
) -> int | None:
    """`memory.activation_checkpointing` as every N-th layer: "auto" is the fastest that the estimate says fits.

    Args:
        longest: positions of the longest sample; the fullest micro-batch holds `data.batch_size` of them.
        memory_bytes: of the device.
    """
    if config.memory.activation_checkpointing != "auto":
        return configured_checkpointing(config)
    estimator = build_estimator(config, world_size=world_size, cuda=cuda)
    return estimator.choose_checkpointing(configured_batch(config, longest), memory_bytes=memory_bytes)


def configured_batch(config: Config, positions: int) -> BatchShape:
    """The fullest micro-batch, of samples of `positions` positions; one sample where its size is left to the device."""
    max_tokens = config.data.max_tokens
    if max_tokens is None:
        return BatchShape.typical(config.data.batch_size, positions)
    return BatchShape.typical(1 if max_tokens == "auto" else max(1, max_tokens // positions), positions)
