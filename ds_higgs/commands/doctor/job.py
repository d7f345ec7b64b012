"""Doctor: what one configuration needs of this machine, without starting anything or downloading."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ds_higgs import hub, setup
from ds_higgs.commands.doctor.finding import Finding, Level, judge
from ds_higgs.commands.doctor.network import DOWNLOAD, find_repository
from ds_higgs.config import Config
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.errors import UserError
from ds_higgs.job import distributed
from ds_higgs.job.preflight import check_trackers
from ds_higgs.model.loading import BASE_FILES, check_weights_fit, load_tokenizer, resolve_base
from ds_higgs.model.tiny import CODEC_FOLDER
from ds_higgs.sizing.memory import GIB, total_bytes
from ds_higgs.training.memory_plan import (
    build_estimator,
    choose_memory_settings,
    configured_batch,
    configured_checkpointing,
)
from ds_higgs.training.zero import build_deepspeed_config

# Of a trainable weight in a checkpoint: bf16 itself, fp32 master copy, AdamW's two moments.
CHECKPOINT_BYTES = 14
FRAMES_PER_SECOND = 25
TEXT_POSITIONS = 150  # of a long sample: texts, roles, system message


def check_job(config: Config) -> Iterator[Finding]:
    """Everything that training asks for before it reads data."""
    for manifest in config.data.manifests:
        yield judge("manifest", str(manifest), "name a file that exists", good=manifest.is_file())
    yield from _check_revision(config)
    base = None
    for finding, folder in _check_base(config):
        base = folder or base
        yield finding
    yield from _check_codec(config, base)
    device = distributed.training_device(distributed.read_ranks())
    yield _tried("run.output_dir", str(config.run.output_dir), lambda: setup.check_run_folder(config))
    yield _tried("data.cache_dir", str(setup.code_cache_dir(config.data)), lambda: setup.check_code_cache(config.data))
    yield _tried("trackers", "installed", lambda: check_trackers(build_deepspeed_config(config)))
    yield _tried("memory section", "possible", lambda: choose_memory_settings(config, device_type=device.type))
    if base is not None:
        yield from _check_space(config, base, device)


def _tried(what: str, found: str, action: Callable[[], object]) -> Finding:
    try:
        action()
    except UserError as error:
        return Finding(what, str(error), "fail", f"change {what}" if "." in what else "as it says")
    return Finding(what, found)


def _check_revision(config: Config) -> Iterator[Finding]:
    base, revision = config.model.base, config.model.revision
    if Path(base).expanduser().exists():
        return
    if hub.is_released(base) and revision not in (None, hub.ORIGINAL_REVISION):
        found = f"{revision}: of the released base this package is made for {hub.ORIGINAL_REVISION}"
        yield Finding("model.revision", found, "warn", "leave model.revision out")
    elif not hub.is_released(base) and revision is None:
        yield Finding("model.revision", "not set: the newest comes", "warn", "set model.revision to a commit")


def _check_base(config: Config) -> Iterator[tuple[Finding, Path | None]]:
    """Of what is on this machine, all but the weights' values is read."""
    name = config.model.base
    local = Path(name).expanduser()
    folder = local if local.exists() else hub.find_downloaded(name, revision=config.model.revision, files=BASE_FILES)
    if folder is None:
        yield find_repository(name, config.model.revision), None
        return
    for what, action in (
        ("model.base", lambda: resolve_base(str(folder), None)),
        ("tokenizer", lambda: load_tokenizer(folder)),
        ("weights", lambda: check_weights_fit(folder)),
    ):
        try:
            action()
        except UserError as error:
            yield Finding(what, str(error), "fail", DOWNLOAD), None
            return
        yield Finding(what, str(folder)), None
    yield Finding("base checkpoint", "config, tokenizer and weights belong together"), folder


def _check_codec(config: Config, base: Path | None) -> Iterator[Finding]:
    name = config.data.codec
    if name is None:  # a base with something wrong may still bring its codec
        own = (base or Path(config.model.base).expanduser()) / CODEC_FOLDER
        name = str(own) if own.is_dir() else hub.HIGGS_TOKENIZER
    folder = Path(name) if Path(name).exists() else hub.find_downloaded(str(name))
    if folder is None:
        yield find_repository(str(name), None)
        return
    try:
        source = find_codec(folder)
        source.load()
    except UserError as error:
        yield Finding("audio codec", str(error), "fail", DOWNLOAD)
    else:
        yield Finding("audio codec", f"{source.kind.name}, loaded from {folder}")


def _check_space(config: Config, base: Path, device: torch.device) -> Iterator[Finding]:
    """Memory and disk against what the estimate says."""
    local = config.model_copy(update={"model": config.model.model_copy(update={"base": str(base)})})
    world_size = distributed.read_ranks().world_size
    try:
        estimator = build_estimator(local, world_size=world_size, cuda=device.type == "cuda")
    except UserError as error:
        yield Finding("lora", str(error), "fail", "change lora.targets")
        return
    positions = round(config.data.max_audio_s * FRAMES_PER_SECOND) + TEXT_POSITIONS
    terms = estimator.terms(configured_batch(config, positions), checkpoint_every=configured_checkpointing(config))
    yield judge_memory(total_bytes(terms), _free_memory(device), positions)
    one = CHECKPOINT_BYTES * estimator.counts["trainable"]
    yield judge_disk(config.run.output_dir, one, count=config.checkpoint.keep_latest + 1)


def judge_memory(needed: int, free: int, positions: int) -> Finding:
    """The estimate for samples of so many positions against what is free of a device now."""
    found = f"{free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB estimated for samples of {positions} positions"
    cure = "end what uses it, or lower data.batch_size, data.max_audio_s, or set model.quantization: nf4"
    return judge("memory", found, cure, good=needed <= free)


def judge_disk(output_dir: Path, one: int, *, count: int) -> Finding:
    """Free space where a run writes against checkpoints of `one` bytes, of which up to `count` exist at once."""
    nearest = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    found = f"{free / GIB:.1f} GiB free, {count} checkpoints take {count * one / GIB:.1f} GiB"
    cure = "empty it, lower checkpoint.keep_latest, or set run.output_dir elsewhere"
    level: Level = "ok" if free >= count * one else "warn" if free >= 2 * one else "fail"
    return Finding("disk of run.output_dir", found, level, "" if level == "ok" else cure)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return distributed.memory_bytes(device)
