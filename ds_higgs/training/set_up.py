"""Configuration to Trainer: what can be wrong is found before weights are read and anything is written."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from ds_higgs import setup
from ds_higgs.adapters.warm_start import check_source
from ds_higgs.checkpoint import find_checkpoint, saved_stage
from ds_higgs.config import Config, LossConfig, OptimConfig
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.loader import StepLoader
from ds_higgs.errors import UserError
from ds_higgs.job import distributed
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.logs import logger, phase
from ds_higgs.job.preflight import check_trackers
from ds_higgs.job.stopping import StopRequests
from ds_higgs.losses import LossWeights
from ds_higgs.model.loading import HiggsAudioModel, resolve_base
from ds_higgs.model.signature import check_model_class
from ds_higgs.speech.in_training import Listener
from ds_higgs.speech.judging import Judges
from ds_higgs.training.batch_plan import decide_batches
from ds_higgs.training.engine import (
    build_engine,
    build_trained_model,
    log_parameters,
)
from ds_higgs.training.keep_base import KeptBase
from ds_higgs.training.memory_plan import MemorySettings, choose_memory_settings, decide_checkpointing
from ds_higgs.training.stage_plan import decide_stage, with_stage
from ds_higgs.training.stop_and_onset import Landmarks
from ds_higgs.training.trainer import Trainer
from ds_higgs.training.validation import build_loss_weights
from ds_higgs.training.validation_sets import ValidationSet
from ds_higgs.training.zero import build_deepspeed_config, splits_from_the_start

HIGH_LEARNING_RATE = 2e-4
HIGH_RATE_OF_WHOLE_WEIGHTS = 1e-4


def set_up(config: Config, ranks: Ranks, stop_requests: StopRequests) -> Trainer:
    """Build everything a run needs, and take its folder over.

    Raises:
        UserError: for whatever the user has to mend.
        Stopped: a rank was asked to stop meanwhile.
    """
    choose_algorithms(deterministic=config.run.deterministic)
    check_trackers(build_deepspeed_config(config))
    warn_of_hasty_start(config.optim)
    warn_of_missing_end(config.loss)
    warn_of_high_rate(config)
    setup.check_run_folder(config)
    setup.check_code_cache(config.data)
    settings = choose_memory_settings(config, device_type=distributed.training_device(ranks).type)

    check_model_class(HiggsAudioModel, allow_fork=config.model.allow_fork)
    base = resolve_base(config.model.base, config.model.revision)
    judges = setup.build_judges(config.eval)
    material = _build_material(config, base, ranks, stop_requests, judges)
    checkpoint = find_checkpoint(config.run.output_dir, resume=config.checkpoint.resume)

    stop_requests.stop_here()
    deepspeed_config = build_deepspeed_config(material.config)
    # A checkpoint holds all that a warm start may change.
    start = config.train.from_ if checkpoint is None else None
    if start is not None:
        check_source(start)
    engine = _build_engine(base, material, settings, deepspeed_config, ranks, start=start)
    trainer = Trainer(
        with_stage(config, material.config.zero.stage_number),
        ranks,
        stop_requests,
        engine=engine,
        train_loader=material.train_loader,
        validation_sets=material.validation_sets,
        listener=material.listener,
        weights=material.weights,
        keep=material.keep,
        landmarks=material.landmarks,
        total_steps=material.total_steps,
    )
    stop_requests.stop_here()
    _take_over_folder(trainer, checkpoint, deepspeed_config, [*material.train, *material.val])
    return trainer


def choose_algorithms(*, deterministic: bool) -> None:
    """Let torch refuse kernels whose results differ from run to run, or not; before cuBLAS makes its workspace."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses matrix products without it
    torch.use_deterministic_algorithms(deterministic)


def check_ranks_stay_together(config: Config, *, whisper: bool, world_size: int) -> None:
    """Refuse what would let ranks wait for each other for ever.

    Raises:
        UserError: ZeRO-3 gathers the Whisper tower's weights on all ranks, and those without reference audio in
            their micro-batch do not come to it.
    """
    if whisper and config.zero.stage == 3 and world_size > 1:
        raise UserError(
            "zero.stage: 3 cannot train a base that hears reference audio through Whisper on several GPUs: one whose "
            "micro-batch has none would let the others wait; expected zero.stage 0, 1 or 2, or "
            "data.encode_whisper_embed: false"
        )


def warn_of_missing_end(loss: LossConfig) -> None:
    """Say so where the end of speech is not learned."""
    if loss.eos_weight == 0:
        logger.warning("loss.eos_weight is 0: the end of speech is not learned, and it will not stop")


def warn_of_hasty_start(optim: OptimConfig) -> None:
    """Say so where a high learning rate comes at once: LoRA's first steps are then the largest."""
    if optim.learning_rate >= HIGH_LEARNING_RATE and optim.warmup_steps == 0:
        logger.warning(
            "optim.learning_rate is %g and there is no warm-up: it often ends in noise or one voice for all; "
            "5e-5 to 1e-4 with optim.warmup_steps of 3 %% of the run is a safer start",
            optim.learning_rate,
        )


def warn_of_high_rate(config: Config) -> None:
    """Say so where the base's own weights are to learn at a rate that is meant for LoRA; Muon has others."""
    key, rate, trained = "learning_rate", config.optim.learning_rate, f"train.mode {config.train.mode}"
    if config.train.mode == "lora":
        if not config.lora.trains_whole_layers:
            return
        key, rate = "whole_learning_rate", config.optim.whole_learning_rate or rate
        trained = "layers in lora.modules_to_save"
    if config.optim.type != "muon" and rate >= HIGH_RATE_OF_WHOLE_WEIGHTS:
        logger.warning(
            "optim.%s is %g, which is a rate for LoRA: with %s it makes the base forget; 5e-6 to 2e-5 is usual",
            key,
            rate,
            trained,
        )


@dataclass(frozen=True)
class _Material:
    """What a run learns from, and how it is weighed.

    config: with numbers where the ZeRO stage and the sizes of batches were left to the device.
    """

    config: Config
    train: list[HiggsDataset]
    val: list[HiggsDataset]
    train_loader: StepLoader
    validation_sets: list[ValidationSet]
    listener: Listener | None
    weights: LossWeights
    keep: KeptBase | None
    landmarks: Landmarks
    total_steps: int

    @property
    def longest(self) -> int:
        """Positions of the longest training sample."""
        return longest_sample(self.train)


def longest_sample(datasets: list[HiggsDataset]) -> int:
    """Positions of the longest sample of all."""
    return max(int(dataset.lengths.max()) for dataset in datasets)


def _build_material(config: Config, base: Path, ranks: Ranks, stop_requests: StopRequests, judges: Judges) -> _Material:
    rules = setup.build_sample_rules(config.data, base)
    check_ranks_stay_together(config, whisper=rules.layout.whisper, world_size=ranks.world_size)
    weights = build_loss_weights(config.loss, num_codebooks=rules.layout.num_codebooks)
    train = setup.build_train_datasets(config, rules, ranks, stop_requests)
    config = decide_stage(
        config,
        longest=longest_sample(train),
        ranks=ranks,
        may_split_weights=_may_split_weights(config, train, whisper=rules.layout.whisper),
        saved=saved_stage(config.run.output_dir, resume=config.checkpoint.resume),
    )
    config = decide_batches(config, longest=longest_sample(train), ranks=ranks)
    train_loader = setup.build_train_loader(config, train, rules, ranks)
    val = setup.build_val_datasets(config, rules, ranks, stop_requests)
    validation_sets = [
        ValidationSet(source.title, setup.build_val_loader(config, dataset, rules, ranks), source.weight)
        for source, dataset in zip(config.data.val_sources, val, strict=True)
    ]
    return _Material(
        config=config,
        train=train,
        val=val,
        train_loader=train_loader,
        validation_sets=validation_sets,
        listener=setup.build_listener(config, val, rules, ranks, judges),
        weights=weights,
        keep=build_kept_base(config, weights),
        landmarks=Landmarks.of(rules),
        total_steps=train_loader.total_steps(config.run.epochs, at_most=config.run.max_steps),
    )


def build_kept_base(config: Config, weights: LossWeights) -> KeptBase | None:
    """What `loss.keep_base` asks for; None where it is unset."""
    keep = config.loss.keep_base
    if keep is None:
        return None
    titles = [source.title for source in config.data.train_sources]
    return KeptBase(
        weight=keep.weight,
        text=keep.on_text,
        audio=keep.on_audio,
        sources=None if keep.sources is None else frozenset(titles.index(name) for name in keep.sources),
        codebooks=weights.codebooks,
    )


def _may_split_weights(config: Config, train: list[HiggsDataset], *, whisper: bool) -> bool:
    """Whether ZeRO-3 can train this: it wants the same weights used by all ranks, once, and not in 4 bits."""
    if whisper or config.eval.num_audio_samples or config.model.quantization or config.loss.keep_base:
        return False
    return config.zero.stage != "auto" or not any(setup.samples_without_audio(dataset) for dataset in train)


def _build_engine(
    base: Path,
    material: _Material,
    settings: MemorySettings,
    deepspeed_config: dict[str, Any],
    ranks: Ranks,
    *,
    start: Path | None,
) -> DeepSpeedEngine:
    config = material.config
    settings = decide_checkpointing(config, settings, longest=material.longest, ranks=ranks)
    model = build_trained_model(
        config,
        base,
        settings,
        device=distributed.training_device(ranks),
        start=start,
        split_by=deepspeed_config if splits_from_the_start(deepspeed_config) else None,
    )
    log_parameters(model)
    return build_engine(config, model, deepspeed_config=deepspeed_config, total_steps=material.total_steps, ranks=ranks)


def _take_over_folder(
    trainer: Trainer, checkpoint: Path | None, deepspeed_config: dict[str, Any], datasets: list[HiggsDataset]
) -> None:
    """Go on from the checkpoint, where there is one, and make the run's folder this start's own."""
    if checkpoint is not None:
        with phase(f"going on from {checkpoint.name}"):
            trainer.resume(checkpoint)
    distributed.on_main_rank(lambda: trainer.take_over_folder(deepspeed_config, starts_anew=checkpoint is None))
    position = trainer.position
    trainer.metrics.rewind(position.step if checkpoint is not None else -1, without=position.events_due())
    distributed.on_main_rank(lambda: setup.list_rejected(trainer.folder.path, *datasets))
    if checkpoint is not None:
        trainer.metrics.write("resume", step=position.step, checkpoint=str(checkpoint))
