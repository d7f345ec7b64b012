"""The ZeRO stage, where the configuration leaves it to what fits the device."""

from collections.abc import Sequence

from ds_higgs.config import Config
from ds_higgs.job.devices import uses_cuda
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.logs import logger
from ds_higgs.sizing.estimator import CHECKPOINTING_CHOICES
from ds_higgs.sizing.memory import GIB, total_bytes
from ds_higgs.training.batch_plan import fullest_batch
from ds_higgs.training.memory_plan import build_estimator, configured_checkpointing, least_memory_bytes

# From the fastest on: stage 2 reduces gradients once a step, as 1 does, and holds less; 3 gathers every weight too.
STAGES = (2, 3)


def decide_stage(config: Config, *, longest: int, ranks: Ranks, may_split_weights: bool, saved: int | None) -> Config:
    """`config` with `zero.stage` a number. All ranks decide alike, by the smallest of their devices.

    Args:
        longest: positions of the longest training sample.
        may_split_weights: whether stage 3 can train this.
        saved: the stage of the checkpoint that the run goes on from, which may not change.
    """
    if config.zero.stage != "auto":
        return config
    if saved is not None:
        logger.info("ZeRO stage: %d, as the checkpoint's", saved)
        return with_stage(config, saved)
    stages = STAGES if may_split_weights and ranks.world_size > 1 else STAGES[:1]
    memory_bytes = least_memory_bytes(ranks)
    stage, fits = choose_stage(
        config, stages, positions=longest, world_size=ranks.world_size, memory_bytes=memory_bytes, cuda=uses_cuda()
    )
    logger.info("ZeRO stage: %d", stage)
    if not fits:
        logger.warning("by the estimate, %.1f GiB are too little for ZeRO-%d; trying", memory_bytes / GIB, stage)
    return with_stage(config, stage)


def choose_stage(
    config: Config,
    stages: Sequence[int] = STAGES,
    *,
    positions: int,
    world_size: int,
    memory_bytes: float,
    cuda: bool = True,
) -> tuple[int, bool]:
    """The first of `stages` that the fullest micro-batch fits with, and True; else that which needs least, and False.

    Activations are kept or recomputed as the configuration says; where it says auto, as is needed.
    """
    batch = fullest_batch(config, positions)
    auto = config.memory.activation_checkpointing == "auto"
    choices = CHECKPOINTING_CHOICES if auto else (configured_checkpointing(config),)
    needed = {}
    for stage in stages:
        estimator = build_estimator(with_stage(config, stage), world_size=world_size, cuda=cuda)
        if any(estimator.fits(batch, checkpoint_every=every, memory_bytes=memory_bytes) for every in choices):
            return stage, True
        needed[stage] = min(total_bytes(estimator.terms(batch, checkpoint_every=every)) for every in choices)
    return min(needed, key=lambda stage: needed[stage]), False


def with_stage(config: Config, stage: int) -> Config:
    """`config` at this stage."""
    return config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})})
