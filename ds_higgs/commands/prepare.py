"""`ds-higgs prepare`: encodes the manifests' audio into the code cache, ahead of training: here, or in shares."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ds_higgs import setup
from ds_higgs.config import Config
from ds_higgs.data.build import Preparation
from ds_higgs.data.ranks import RankChannel
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.shares.dealing import Share
from ds_higgs.data.shares.joining import ShareJoin
from ds_higgs.data.shares.making import ShareMaker
from ds_higgs.errors import UserError
from ds_higgs.job import devices, distributed
from ds_higgs.job.answers import print_answer
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.logs import phase
from ds_higgs.model.loading import resolve_base


def prepare(config: Config, *, processes: int | None = None) -> None:
    """Encode what the cache lacks of all manifests; with a launcher every rank takes its share.

    Args:
        processes: that encode at once on this machine, without a launcher; None is one per GPU, or one.

    Raises:
        UserError: with every problem of a manifest; what is wrong with one does not keep the others from being encoded.
    """
    _check_processes(processes)

    def prepare_one(manifest: Path, rules: SampleRules, ranks: Ranks) -> None:
        found = _devices_of(ranks)
        preparation = Preparation(manifest, rules=rules, cache_dir=_cache_dir(config), ranks=_channel(ranks))
        with setup.encoding_progress(manifest, enabled=ranks.is_main) as progress:
            preparation.run(
                on_bad_sample=config.data.on_bad_sample,
                devices=found,
                num_processes=1 if ranks.world_size > 1 else processes or len(found),
                progress=progress,
            )
        preparation.dataset()
        if ranks.is_main:
            encoded = f"{preparation.num_missing} encoded now, "
            encoded += f"{preparation.num_clips - preparation.num_missing} in the cache already"
            print_answer(f"{_describe(preparation)}: {encoded} ({_cache_dir(config)})")

    _for_all_manifests(config, prepare_one)


def prepare_share(config: Config, share: Share, *, processes: int | None = None) -> None:
    """Encode one share of all manifests' audio into folders of its own in the cache folder.

    Args:
        processes: as for `prepare`.

    Raises:
        UserError: with every problem of the share's audio; or there is a launcher.
    """
    _check_processes(processes)
    if config.data.audio == "elsewhere":
        raise UserError(f"--share {share}: data.audio is elsewhere; expected to be started where the recordings are")
    if distributed.read_ranks().world_size > 1:
        raise UserError(
            f"--share {share}: started on several ranks; expected one process a share, without a launcher: it uses all "
            "GPUs of its machine"
        )

    def make(manifest: Path, rules: SampleRules, ranks: Ranks) -> None:
        found = _devices_of(ranks)
        maker = ShareMaker(manifest, share, rules=rules, cache_dir=_cache_dir(config))
        with setup.encoding_progress(manifest, enabled=True) as progress:
            maker.run(
                devices=found,
                skip_bad=config.data.on_bad_sample == "skip",
                num_processes=processes or len(found),
                progress=progress,
            )
        encoded = f"{maker.num_missing} encoded now, {maker.num_clips - maker.num_missing} before"
        print_answer(f"{manifest}: share {share}: {maker.num_clips} clips: {encoded} ({maker.folder})")

    _for_all_manifests(config, make)


def join_shares(config: Config, folders: Sequence[Path]) -> None:
    """Check the shares of all manifests and join them into the cache folder's prepared sets.

    Args:
        folders: cache folders that shares were made in, beside `data.cache_dir`.

    Raises:
        UserError: naming the shares that are missing, unfinished or damaged; or with every problem of a manifest.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--join: {folder}: no such folder; expected a cache folder in which shares were made")

    def join(manifest: Path, rules: SampleRules, ranks: Ranks) -> None:
        cache_dir, channel = _cache_dir(config), _channel(ranks)
        with phase(f"joining the shares of {manifest.name}"):
            shares = ShareJoin(manifest, rules=rules, roots=[cache_dir, *folders])
            channel.on_first(lambda: shares.take_in(cache_dir))
            preparation = Preparation(
                manifest, rules=rules, cache_dir=cache_dir, ranks=channel, known=shares.known_files()
            )
            preparation.run(on_bad_sample=config.data.on_bad_sample, devices=[])
            preparation.dataset()
        if ranks.is_main:
            print_answer(f"{_describe(preparation)} of {len(shares.shares)} shares ({cache_dir})")

    _for_all_manifests(config, join)


def _for_all_manifests(config: Config, action: Callable[[Path, SampleRules, Ranks], None]) -> None:
    """Call it for every manifest; what is wrong with one is raised after the others had their turn."""
    setup.check_code_cache(config.data)
    base = resolve_base(config.model.base, config.model.revision)
    rules = setup.build_sample_rules(config.data, base)
    ranks = distributed.read_ranks()
    if ranks.world_size > 1:
        distributed.init_process_group()
    refusals = []
    try:
        for manifest, checked in setup.manifests_with_rules(config.data, rules):
            try:
                action(manifest, checked, ranks)
            except UserError as error:
                refusals.append(str(error))
    finally:
        if ranks.world_size > 1:
            distributed.destroy_process_group()
    if refusals:
        raise UserError("\n".join(refusals))


def _describe(preparation: Preparation) -> str:
    left_out = len({problem.number for problem in preparation.problems})
    return (
        f"{preparation.manifest}: {preparation.num_samples} samples"
        + (f" ({left_out} left out)" if left_out else "")
        + (f" ({preparation.num_excluded} left out by data.exclude)" if preparation.num_excluded else "")
        + f", {preparation.num_clips} clips"
    )


def _check_processes(processes: int | None) -> None:
    if processes is not None and processes < 1:
        raise UserError(f"--processes: {processes} found, expected 1 or more")


def _cache_dir(config: Config) -> Path:
    return setup.code_cache_dir(config.data)


def _channel(ranks: Ranks) -> RankChannel:
    return RankChannel(ranks.rank, ranks.world_size, distributed.gather_bytes)


def _devices_of(ranks: Ranks) -> list[str]:
    """Where this process may run codecs."""
    if ranks.world_size > 1 or not devices.uses_cuda():
        return [str(distributed.training_device(ranks))]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
