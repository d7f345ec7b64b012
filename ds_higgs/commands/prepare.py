"""`ds-higgs prepare`: encodes the manifests' audio into the code cache, ahead of training."""

from pathlib import Path

import torch

from ds_higgs import setup
from ds_higgs.config import Config
from ds_higgs.data.build import Preparation
from ds_higgs.data.ranks import RankChannel
from ds_higgs.data.rules import SampleRules
from ds_higgs.errors import UserError
from ds_higgs.job import devices, distributed
from ds_higgs.job.answers import print_answer
from ds_higgs.job.distributed import Ranks
from ds_higgs.model.loading import resolve_base


def prepare(config: Config, *, processes: int | None = None) -> None:
    """Encode what the cache lacks of all manifests; with a launcher every rank takes its share.

    Args:
        processes: that encode at once on this machine, without a launcher; None is one per GPU, or one.

    Raises:
        UserError: with every problem of a manifest; what is wrong with one does not keep the others from being encoded.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--processes: {processes} found, expected 1 or more")
    setup.check_code_cache(config.data)
    base = resolve_base(config.model.base, config.model.revision)
    rules = setup.build_sample_rules(config.data, base)
    ranks = distributed.read_ranks()
    if ranks.world_size > 1:
        distributed.init_process_group()
    try:
        refusals = [
            refusal
            for manifest, checked in setup.manifests_with_rules(config.data, rules)
            if (refusal := _prepare_manifest(config, manifest, checked, ranks, processes)) is not None
        ]
    finally:
        if ranks.world_size > 1:
            distributed.destroy_process_group()
    if refusals:
        raise UserError("\n".join(refusals))


def _prepare_manifest(
    config: Config, manifest: Path, rules: SampleRules, ranks: Ranks, processes: int | None
) -> str | None:
    """Why the manifest cannot be trained on, if so."""
    cache_dir = setup.code_cache_dir(config.data)
    builders = RankChannel(ranks.rank, ranks.world_size, distributed.gather_bytes)
    devices = _devices(ranks)
    preparation = Preparation(manifest, rules=rules, cache_dir=cache_dir, ranks=builders)
    try:
        with setup.encoding_progress(manifest, enabled=ranks.is_main) as progress:
            preparation.run(
                on_bad_sample=config.data.on_bad_sample,
                devices=devices,
                num_processes=1 if ranks.world_size > 1 else processes or len(devices),
                progress=progress,
            )
        preparation.dataset()
    except UserError as error:
        return str(error)
    if ranks.is_main:
        left_out = len({problem.number for problem in preparation.problems})
        print_answer(
            f"{manifest}: {preparation.num_samples} samples"
            + (f" ({left_out} left out)" if left_out else "")
            + (f" ({preparation.num_excluded} left out by data.exclude)" if preparation.num_excluded else "")
            + f", {preparation.num_clips} clips: {preparation.num_missing} encoded now, "
            f"{preparation.num_clips - preparation.num_missing} in the cache already ({cache_dir})"
        )
    return None


def _devices(ranks: Ranks) -> list[str]:
    if ranks.world_size > 1 or not devices.uses_cuda():
        return [str(distributed.training_device(ranks))]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
