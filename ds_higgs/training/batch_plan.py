"""The micro-batch, and how many make a step, where the configuration leaves them to what fits the device."""

import dataclasses

from ds_higgs.config import Config
from ds_higgs.data.sampling import LENGTH_MULTIPLE
from ds_higgs.job.devices import uses_cuda
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.logs import logger
from ds_higgs.sizing.estimator import CHECKPOINTING_CHOICES, Estimator
from ds_higgs.sizing.inputs import BatchShape
from ds_higgs.training.memory_plan import (
    build_estimator,
    configured_batch,
    configured_checkpointing,
    least_memory_bytes,
)


def leaves_batches_open(config: Config) -> bool:
    """Whether `decide_batches` has something to decide."""
    return config.optim.global_batch_size is not None or config.data.max_tokens == "auto"


def fullest_batch(config: Config, positions: int) -> BatchShape:
    """A micro-batch of samples of `positions` positions; of one where its size is still to be decided."""
    return BatchShape.typical(1, positions) if leaves_batches_open(config) else configured_batch(config, positions)


def decide_batches(config: Config, *, longest: int, ranks: Ranks) -> Config:
    """`config` with every size a number: the micro-batch is the largest that fits, a step the global batch.

    All ranks decide alike, by the smallest of their devices. What a step learns from depends on neither ranks nor
    device; the order of samples under `data.max_tokens: auto` depends on the device, and not on the ranks.

    Args:
        longest: positions of the longest training sample; every micro-batch has to fit if made of such alone.
    """
    if not leaves_batches_open(config):
        return config
    memory_bytes, cuda = least_memory_bytes(ranks), uses_cuda()
    if config.optim.global_batch_size is None:
        estimator = build_estimator(config, world_size=1, cuda=cuda)
        largest = _largest_batch(config, estimator, longest, memory_bytes)
        return _with_max_tokens(config, largest * round_up(longest))
    estimator = build_estimator(config, world_size=ranks.world_size, cuda=cuda)
    return _with_micro_batches(
        config,
        ranks.world_size,
        at_once=_largest_batch(config, estimator, longest, memory_bytes),
        accumulating=_largest_batch(config, _accumulating(estimator), longest, memory_bytes),
    )


def split_step(global_batch_size: int, world_size: int, *, at_once: int, accumulating: int) -> tuple[int, int]:
    """The samples of a micro-batch and the micro-batches of a rank in a step of so many samples.

    Args:
        at_once, accumulating: the largest micro-batch that fits where it is a rank's only one, and where it is not.
    """
    share = -(-global_batch_size // world_size)
    if at_once >= share:
        return share, 1
    micro_batches = -(-share // accumulating)
    return -(-share // micro_batches), micro_batches


def _with_micro_batches(config: Config, world_size: int, *, at_once: int, accumulating: int) -> Config:
    global_batch_size = config.optim.global_batch_size
    assert global_batch_size is not None
    size, micro_batches = split_step(global_batch_size, world_size, at_once=at_once, accumulating=accumulating)
    logger.info(
        "a step of %d samples: %d micro-batches of up to %d on each of %d ranks",
        *(global_batch_size, micro_batches, size, world_size),
    )
    if global_batch_size < world_size:
        logger.warning("optim.global_batch_size is %d: some of %d ranks idle", global_batch_size, world_size)
    data = config.data.model_copy(update={"batch_size": size})
    optim = config.optim.model_copy(update={"gradient_accumulation_steps": micro_batches})
    return config.model_copy(update={"data": data, "optim": optim})


def _with_max_tokens(config: Config, max_tokens: int) -> Config:
    logger.info("data.max_tokens: %d", max_tokens)
    return config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": max_tokens})})


def _largest_batch(config: Config, estimator: Estimator, longest: int, memory_bytes: int) -> int:
    """With the fastest checkpointing that a single sample fits with."""
    auto = config.memory.activation_checkpointing == "auto"
    for every in CHECKPOINTING_CHOICES if auto else (configured_checkpointing(config),):
        largest = estimator.largest_batch(longest, checkpoint_every=every, memory_bytes=memory_bytes)
        if largest > 0:
            return largest
    logger.warning("not even one sample of %d positions fits by the estimate; trying", longest)
    return 1


def _accumulating(estimator: Estimator) -> Estimator:
    """With the sums of gradients that more than one micro-batch needs."""
    return dataclasses.replace(estimator, policy=dataclasses.replace(estimator.policy, gradient_accumulation_steps=2))


def round_up(longest: int) -> int:
    """As the model pads the longest sample."""
    return -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
