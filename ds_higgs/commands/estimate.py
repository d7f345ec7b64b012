"""`ds-higgs estimate`: memory per GPU before anything is loaded, and what fits a card."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_higgs.config import Config
from ds_higgs.job.answers import print_answer
from ds_higgs.model.parts import PATH_NAMES
from ds_higgs.sizing.activations import flash_workspace
from ds_higgs.sizing.estimator import CHECKPOINTING_CHOICES, Estimator, describe_checkpointing
from ds_higgs.sizing.host import estimate_host_memory
from ds_higgs.sizing.memory import GIB, total_bytes
from ds_higgs.training.memory_plan import build_estimator, configured_batch, configured_checkpointing, with_config
from ds_higgs.training.stage_plan import choose_stage, with_stage


def run_estimate(config: Config, *, world_size: int, positions: int, card_gib: Sequence[float]) -> None:
    """Print parameters, memory by term, and what fits each card of `card_gib`.

    Where `zero.stage` is auto, the terms are those of the first card's.
    """
    is_open = config.zero.stage == "auto"
    stages = {gib: _stage(config, gib * GIB, positions=positions, world_size=world_size) for gib in card_gib}
    config = with_stage(config, next((stage for stage, _ in stages.values()), config.zero.stage_number))
    estimator = build_estimator(config, world_size=world_size)
    print_parameters(config.model.base, estimator.counts)
    batch = configured_batch(config, positions)
    every = configured_checkpointing(config)
    print_answer(
        f"\nOne of {world_size} GPUs: ZeRO-{config.zero.stage}, {config.zero.precision}, "
        f"{batch.num_samples} samples of {batch.longest} positions, checkpointing {describe_checkpointing(every)}\n"
    )
    print_terms(estimator.terms(batch, checkpoint_every=every))
    workspace = flash_workspace(estimator.shape, batch, estimator.policy)
    print_answer(
        f"\nFlashAttention takes {workspace / GIB:.3f} GiB for itself in every layer's backward pass, within the above."
    )
    print_host_memory(estimate_host_memory(estimator.policy, trainable=estimator.counts["trainable"]))
    if config.eval.asr or config.eval.speaker_model:
        print_answer("The judges of eval are not in the above: they are on the GPU between steps, while they listen.")
    for gib, (stage, fits) in stages.items():
        says = f" (auto: ZeRO-{stage}{'' if fits else ', which does not fit'})" if is_open else ""
        print_answer(f"\nA card of {gib:g} GiB holds, of samples of {positions} positions{says}:")
        print_batches(with_config(estimator, with_stage(config, stage)), positions, memory_bytes=gib * GIB)


def _stage(config: Config, memory_bytes: float, *, positions: int, world_size: int) -> tuple[int, bool]:
    if config.zero.stage != "auto":
        return config.zero.stage, True
    return choose_stage(config, positions=positions, world_size=world_size, memory_bytes=memory_bytes)


def print_batches(estimator: Estimator, positions: int, *, memory_bytes: float) -> None:
    for choice in CHECKPOINTING_CHOICES:
        largest = estimator.largest_batch(positions, checkpoint_every=choice, memory_bytes=memory_bytes)
        found = f"batch size {largest}" if largest else "not one sample"
        print_answer(f"  checkpointing {describe_checkpointing(choice):<16} {found}")


def print_parameters(base: str | Path, counts: Mapping[str, int]) -> None:
    print_answer(f"{base}: {counts['base']:,} parameters")
    by_path = ", ".join(f"{path} {counts[path]:,}" for path in PATH_NAMES if counts[path])
    print_answer(f"trained: {counts['trainable']:,} ({by_path})")


def print_host_memory(terms: Mapping[str, int]) -> None:
    """What there is of it."""
    if found := {name: size for name, size in terms.items() if size}:
        print_answer("\nCPU memory of rank 0, of which no other takes more, for:\n")
        print_terms(found)


def print_terms(terms: Mapping[str, int]) -> None:
    for name, size in terms.items():
        print_answer(f"  {name:<22}{size / GIB:>9.3f} GiB")
    print_answer(f"  {'total':<22}{total_bytes(terms) / GIB:>9.3f} GiB")
