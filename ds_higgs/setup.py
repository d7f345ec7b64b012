"""The configuration's data section, made into rules, data sets and loaders."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ds_higgs.config import Config, DataConfig, EvalConfig
from ds_higgs.config.sources import TrainSource
from ds_higgs.data.build import Preparation
from ds_higgs.data.cache import default_code_cache
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.conditions import NO_DROPS, DropRates
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.encoding import Progress
from ds_higgs.data.exclusion import read_exclude_list
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.mixture import MixedSource, Mixture
from ds_higgs.data.order import EpochOrder, Order, SampleSource
from ds_higgs.data.oversampling import oversample_short
from ds_higgs.data.problems import write_rejected
from ds_higgs.data.prompt_forms import joint_form, served_form
from ds_higgs.data.prompts import choose_prompts_of_all
from ds_higgs.data.ranks import RankChannel
from ds_higgs.data.review.ends import warn_of_cut_recordings, warn_of_missing_ends
from ds_higgs.data.rules import SampleRules, build_rules
from ds_higgs.errors import UserError
from ds_higgs.job import distributed
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.logs import logger, phase
from ds_higgs.job.preflight import check_folder_writable
from ds_higgs.job.stopping import StopRequests
from ds_higgs.model.generation import Sampling
from ds_higgs.model.loading import load_tokenizer, read_model_config
from ds_higgs.run_folder import RunFolder
from ds_higgs.speech.in_training import Listener
from ds_higgs.speech.judging import Judges
from ds_higgs.speech.samples import Synthesizer


def check_run_folder(config: Config) -> None:
    """Raises UserError where the run's folder cannot be written; nothing is made."""
    check_folder_writable(config.run.output_dir, "run.output_dir")


def check_code_cache(config: DataConfig) -> None:
    """Raises UserError where the code cache can neither be written nor read; nothing is made."""
    folder = code_cache_dir(config)
    if not (folder / "codes").is_dir():  # another user's, complete, may be only read
        check_folder_writable(folder, "data.cache_dir")


def build_sample_rules(config: DataConfig, base: Path) -> SampleRules:
    """What the base checkpoint and the configuration ask of a sample."""
    model_config = read_model_config(base)
    for key in ("use_delay_pattern", "encode_whisper_embed"):
        wanted, of_base = getattr(config, key), getattr(model_config, key)
        if wanted not in ("auto", of_base):
            logger.warning("data.%s is %s, the base checkpoint has %s: inference will differ", key, wanted, of_base)
    rules = build_rules(
        tokenizer=load_tokenizer(base),
        model_config=model_config,
        codec=find_codec(config.codec, base),
        audio_root=config.audio_root,
        min_audio_s=config.min_audio_s,
        max_audio_s=config.max_audio_s,
        max_tokens=None if config.max_tokens == "auto" else config.max_tokens,
        use_delay_pattern=_as_override(config.use_delay_pattern),
        encode_whisper_embed=_as_override(config.encode_whisper_embed),
        reference_turn=config.reference_turn,
        prompt_form=config.prompt_form,
    )
    if rules.layout.whisper and config.audio == "elsewhere":
        raise UserError(
            "data.audio: elsewhere, but Whisper features are made of the recordings; expected here, or "
            "data.encode_whisper_embed: false"
        )
    drops = DropRates(config.drop_reference, config.drop_reference_text, config.drop_system)
    rules = replace(rules, drops=drops, redraw=config.reference == "redraw", audio_here=config.audio == "here")
    if config.exclude is None:
        return rules
    names = [manifest.name for manifest in dict.fromkeys(config.manifests)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.exclude: two manifests are named {repeated[0]}, and its list cannot tell them apart")
    return replace(rules, exclude=read_exclude_list(config.exclude, config.manifests))


def validation_rules(rules: SampleRules) -> SampleRules:
    """The same for what is validated on and spoken: whole prompts in one form, the served one of a training in both."""
    return replace(rules, prompt_form=served_form(rules.prompt_form), drops=NO_DROPS, redraw=False)


def source_rules(source: TrainSource, rules: SampleRules) -> SampleRules:
    """The same for one source of the training."""
    redraw = rules.redraw if source.reference is None else source.reference == "redraw"
    return replace(rules, prompt_form=source.prompt_form or rules.prompt_form, redraw=redraw)


def manifests_with_rules(config: DataConfig, rules: SampleRules) -> list[tuple[Path, SampleRules]]:
    """Every manifest, those for training first, with what its samples are checked against."""
    training = [(source.manifest, source_rules(source, rules)) for source in config.train_sources]
    return training + [(source.manifest, replace(rules, redraw=False)) for source in config.val_sources]


def build_train_datasets(
    config: Config, rules: SampleRules, ranks: Ranks, stop: StopRequests | None = None
) -> list[HiggsDataset]:
    """One of each source; see `build_dataset`."""
    sources = config.data.train_sources
    return [build_dataset(config, one.manifest, source_rules(one, rules), ranks, stop) for one in sources]


def build_val_datasets(
    config: Config, rules: SampleRules, ranks: Ranks, stop: StopRequests | None = None
) -> list[HiggsDataset]:
    """One of each validation manifest, all in the one form in which the model will be asked; see `build_dataset`."""
    form = joint_form([source_rules(source, rules).prompt_form for source in config.data.train_sources])
    asked = validation_rules(replace(rules, prompt_form=form))
    return [build_dataset(config, one.manifest, asked, ranks, stop) for one in config.data.val_sources]


def build_dataset(
    config: Config, manifest: Path, rules: SampleRules, ranks: Ranks, stop: StopRequests | None = None
) -> HiggsDataset:
    """The samples of a manifest, checked, their audio in the code cache; every rank encodes its share.

    Raises:
        UserError: with every problem of the manifest.
        Stopped: a rank was asked to stop; what is encoded stays in the cache.
    """
    stop = stop or StopRequests()
    preparation = Preparation(
        manifest,
        rules=rules,
        cache_dir=code_cache_dir(config.data),
        ranks=RankChannel(
            ranks.rank,
            ranks.world_size,
            distributed.gather_bytes,
            stop_requested=stop.requested_anywhere,
            stop_here=stop.stop_here,
        ),
    )
    shown = encoding_progress(manifest, enabled=ranks.is_main and config.logging.progress)
    with phase(f"checking {manifest.name}"), shown as progress:
        preparation.run(
            on_bad_sample=config.data.on_bad_sample,
            devices=[str(distributed.training_device(ranks))],
            progress=progress,
        )
        if ranks.is_main and rules.audio_here:
            warn_of_cut_recordings(preparation, rules.layout)
        return preparation.dataset()


@contextmanager
def encoding_progress(manifest: Path, *, enabled: bool) -> Iterator[Progress]:
    """A bar of clips encoded, clips a second and time left; none where nothing is to be encoded."""
    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if total > 0 and not bars:
            hidden = None if enabled else True  # None: shown on a terminal
            if enabled and not sys.stderr.isatty():
                logger.info("%s: encoding %d clips", manifest.name, total)
            bars.append(tqdm(total=total, unit="clip", desc=manifest.name, dynamic_ncols=True, disable=hidden))
        for bar in bars:
            bar.update(done - bar.n)

    try:
        yield show
    finally:
        for bar in bars:
            bar.close()


def list_rejected(run_dir: Path, *datasets: HiggsDataset) -> None:
    """Write rejected.jsonl: the samples that were left out, each with the reasons."""
    for dataset in datasets:
        write_rejected(RunFolder(run_dir).rejected_file, dataset.manifest, dataset.rejected)


def build_train_loader(
    config: Config, datasets: Sequence[HiggsDataset], rules: SampleRules, ranks: Ranks
) -> StepLoader:
    """Optimizer steps of shuffled, length-grouped micro-batches of all sources."""
    if config.zero.stage == 3:
        for dataset in datasets:
            _check_audio_everywhere(dataset)
    if ranks.is_main:
        for dataset in datasets:
            warn_of_missing_ends(dataset, BatchCollator(rules.layout))
    return StepLoader(
        build_order(config, _with_short_ones_repeated(config.data, datasets, rules)),
        BatchCollator(rules.layout),
        gradient_accumulation_steps=config.optim.gradient_accumulation_steps,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=config.data.num_workers,
        pin_memory=distributed.training_device(ranks).type == "cuda",
        whole_steps=config.optim.global_batch_size is not None,
    )


def _with_short_ones_repeated(
    config: DataConfig, datasets: Sequence[HiggsDataset], rules: SampleRules
) -> list[SampleSource]:
    frames = rules.codec.frames_in(config.short_s)
    return [oversample_short(dataset, frames=frames, times=config.short_times) for dataset in datasets]


def build_order(config: Config, datasets: Sequence[SampleSource]) -> Order:
    """Which samples are trained on when: one data set epoch by epoch, or several mixed."""
    if config.optim.global_batch_size is not None:
        return EpochOrder(
            datasets[0], batch_size=config.optim.global_batch_size, seed=config.run.seed, whole_steps=True
        )
    limits = _micro_batch_limits(config.data)
    if not config.data.train:
        return EpochOrder(datasets[0], seed=config.run.seed, **limits)
    sources = zip(config.data.train, datasets, strict=True)
    return Mixture(
        [_mixed(source, dataset, epochs=config.run.epochs) for source, dataset in sources],
        seed=config.run.seed,
        **limits,
    )


def _mixed(source: TrainSource, dataset: SampleSource, *, epochs: int) -> MixedSource:
    """A source's part; without weights, sources share as they have to so that all end together."""
    if source.weight is not None:
        passes = None if source.epochs is None else source.epochs * epochs
        return MixedSource(source.title, dataset, Fraction(str(source.weight)), passes)
    passes = (source.epochs or 1) * epochs
    return MixedSource(source.title, dataset, Fraction(passes * len(dataset)), passes)


def build_val_loader(config: Config, dataset: HiggsDataset, rules: SampleRules, ranks: Ranks) -> StepLoader:
    """The same micro-batches in the same order every time, one a step."""
    return StepLoader(
        EpochOrder(dataset, shuffle=False, **_micro_batch_limits(config.data)),
        BatchCollator(rules.layout),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def _micro_batch_limits(config: DataConfig) -> dict[str, Any]:
    return {"batch_size": None if config.max_tokens else config.batch_size, "max_tokens": config.max_tokens}


def code_cache_dir(config: DataConfig) -> Path:
    """`data.cache_dir`, by default a folder of the user's that all runs share."""
    return config.cache_dir or default_code_cache()


def build_judges(config: EvalConfig) -> Judges:
    """Who listens to what is spoken in the training, loaded on the CPU; nobody where no key names a model.

    Raises:
        UserError: one cannot be loaded, or knows no such language.
    """
    judges = Judges.of(config.asr, config.speaker_model, language=config.language)
    if judges.present:
        with phase("loading the judges"):
            judges.load()
    return judges


def build_listener(
    config: Config, datasets: Sequence[HiggsDataset], rules: SampleRules, ranks: Ranks, judges: Judges
) -> Listener | None:
    """What speaks validation prompts while the run trains, where `eval.num_audio_samples` asks for it."""
    if config.eval.num_audio_samples == 0 or not datasets:
        return None
    device = distributed.training_device(ranks)
    judge_device = device if config.eval.judge_device == "auto" else torch.device("cpu")
    if judges.present:
        logger.info("judges: %.2f GB, on %s while they listen", judges.num_bytes / 1e9, judge_device)
    synthesizer = Synthesizer(
        rules.codec.load(device),
        sampling=Sampling(),
        seed=config.run.seed,
        max_seconds=config.eval.max_audio_s,
    )
    prompts = choose_prompts_of_all(
        datasets,
        BatchCollator(rules.layout),
        count=config.eval.num_audio_samples,
        with_texts=judges.transcriber is not None,
    )
    return Listener(
        prompts, synthesizer, run_dir=config.run.output_dir, ranks=ranks, judges=judges, judge_device=judge_device
    )


def samples_without_audio(dataset: HiggsDataset) -> list[str]:
    """Names of the samples that have no audio to learn."""
    return [dataset.sample_id(index) for index in np.flatnonzero(dataset.count_target_frames() == 0).tolist()]


def _check_audio_everywhere(dataset: HiggsDataset) -> None:
    if without := samples_without_audio(dataset):
        raise UserError(
            f"{without[0]}: has no audio to learn ({len(without)} such samples), and ZeRO stage 3 cannot train those: "
            "its ranks would wait for each other forever; expected zero.stage 2 or below, or audio in every sample"
        )


def _as_override(value: bool | str) -> bool | None:
    return None if value == "auto" else bool(value)
