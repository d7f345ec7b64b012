"""`ds-higgs estimate`: memory per GPU before anything is loaded, and what fits a card."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_higgs.config import Config
from ds_higgs.model.loading import read_config_only
from ds_higgs.sizing.activations import flash_workspace
from ds_higgs.sizing.inputs import BatchShape, ModelShape, Policy
from ds_higgs.sizing.memory import GIB, estimate_memory, total_bytes
from ds_higgs.sizing.shape import count_lora_parameters, model_shape

ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
# From the fastest to the one that keeps least: recompute no layer, every 4th, every 2nd, every layer.
CHECKPOINTING_CHOICES = (None, 4, 2, 1)
# Of a card's memory: other processes and what the estimate does not see take the rest.
USABLE_SHARE = 0.92


@dataclasses.dataclass(frozen=True)
class Estimator:
    """The estimate's inputs that do not depend on the batch."""

    shape: ModelShape
    counts: Mapping[str, int]
    policy: Policy

    @classmethod
    def build(cls, config: Config, *, world_size: int, cuda: bool = True) -> "Estimator":
        """Read the base checkpoint's config.json, and no weights.

        Raises:
            UserError: for a base that has no config, and LoRA targets that are not in it.
        """
        model_config = read_config_only(config.model.base, config.model.revision)
        lora = config.lora
        counts = count_lora_parameters(
            model_config, rank=lora.rank, targets=lora.targets, modules_to_save=lora.modules_to_save, dora=lora.dora
        )
        return cls(model_shape(model_config), counts, build_policy(config, world_size=world_size, cuda=cuda))

    def with_config(self, config: Config) -> "Estimator":
        """For another configuration of the same base and LoRA settings."""
        policy = build_policy(config, world_size=self.policy.world_size, cuda=self.policy.cuda)
        return dataclasses.replace(self, policy=policy)

    def terms(self, batch: BatchShape, *, checkpoint_every: int | None) -> dict[str, int]:
        """Bytes by term for `batch`."""
        return estimate_memory(
            self.shape,
            batch,
            dataclasses.replace(self.policy, checkpoint_every=checkpoint_every),
            frozen=self.counts["total"] - self.counts["trainable"],
            trainable=self.counts["trainable"],
            quantizable=self.counts["quantizable"],
        )

    def fits(self, batch: BatchShape, *, checkpoint_every: int | None, memory_bytes: float) -> bool:
        return total_bytes(self.terms(batch, checkpoint_every=checkpoint_every)) <= USABLE_SHARE * memory_bytes

    def largest_batch(self, positions: int, *, checkpoint_every: int | None, memory_bytes: float) -> int:
        """Most samples of `positions` positions that fit; 0 if not even one does."""
        smallest, tried = 0, 1
        while self.fits(
            BatchShape.typical(tried, positions), checkpoint_every=checkpoint_every, memory_bytes=memory_bytes
        ):
            smallest, tried = tried, 2 * tried
        while tried - smallest > 1:
            middle = (smallest + tried) // 2
            batch = BatchShape.typical(middle, positions)
            if self.fits(batch, checkpoint_every=checkpoint_every, memory_bytes=memory_bytes):
                smallest = middle
            else:
                tried = middle
        return smallest

    def choose_checkpointing(self, batch: BatchShape, *, memory_bytes: float) -> int | None:
        """The fastest of CHECKPOINTING_CHOICES that fits; the last one if none does."""
        for every in CHECKPOINTING_CHOICES:
            if self.fits(batch, checkpoint_every=every, memory_bytes=memory_bytes):
                return every
        return CHECKPOINTING_CHOICES[-1]


def build_policy(config: Config, *, world_size: int, cuda: bool) -> Policy:
    """What `config` says that memory depends on; checkpointing "auto" is left to the caller."""
    zero, memory = config.zero, config.memory
    quantized = config.model.quantization == "nf4"
    return Policy(
        element_bytes=ELEMENT_BYTES[zero.precision],
        zero_stage=zero.stage,
        world_size=world_size,
        offload_optimizer=zero.offload_optimizer,
        overlap_comm=zero.overlap_comm,
        reduce_bucket_elements=zero.reduce_bucket_size,
        fp32_reduction=zero.fp32_reduction,
        gradient_accumulation_steps=config.optim.gradient_accumulation_steps,
        lora_rank=config.lora.rank,
        lora_dropout=config.lora.dropout,
        kernels="torch" if memory.kernels == "auto" else memory.kernels,  # Liger's keep as much
        grouped_lora=memory.grouped_lora and config.zero.stage < 3 and not config.lora.dora and not quantized,
        supervised_heads=memory.supervised_text_head,
        quantized=quantized,
        cuda=cuda,
    )


def configured_checkpointing(config: Config) -> int | None:
    """`memory.activation_checkpointing` as every N-th layer; "auto" counts as every layer."""
    policy = config.memory.activation_checkpointing
    return policy if isinstance(policy, int) else {"none": None, "full": 1, "auto": 1}[policy]


def run_estimate(config: Config, *, world_size: int, positions: int, card_gib: Sequence[float]) -> None:
    """Print parameters, memory by term, and what fits each card of `card_gib`."""
    estimator = Estimator.build(config, world_size=world_size)
    print_parameters(config.model.base, estimator.counts)
    batch = configured_batch(config, positions)
    every = configured_checkpointing(config)
    print(
        f"\nOne of {world_size} GPUs: ZeRO-{config.zero.stage}, {config.zero.precision}, "
        f"{batch.num_samples} samples of {batch.longest} positions, checkpointing {describe_checkpointing(every)}\n"
    )
    print_terms(estimator.terms(batch, checkpoint_every=every))
    workspace = flash_workspace(estimator.shape, batch, estimator.policy)
    print(
        f"\nFlashAttention takes {workspace / GIB:.3f} GiB for itself in every layer's backward pass, within the above."
    )
    for gib in card_gib:
        print(f"\nA card of {gib:g} GiB holds, of samples of {positions} positions:")
        for choice in CHECKPOINTING_CHOICES:
            largest = estimator.largest_batch(positions, checkpoint_every=choice, memory_bytes=gib * GIB)
            found = f"batch size {largest}" if largest else "not one sample"
            print(f"  checkpointing {describe_checkpointing(choice):<16} {found}")


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
    estimator = Estimator.build(config, world_size=world_size, cuda=cuda)
    return estimator.choose_checkpointing(configured_batch(config, longest), memory_bytes=memory_bytes)


def configured_batch(config: Config, positions: int) -> BatchShape:
    if config.data.max_tokens is None:
        return BatchShape.typical(config.data.batch_size, positions)
    return BatchShape.typical(max(1, config.data.max_tokens // positions), positions)


def describe_checkpointing(every: int | None) -> str:
    return {None: "none", 1: "full"}.get(every, f"every {every} layers")


def print_parameters(base: str | Path, counts: Mapping[str, int]) -> None:
    print(f"{base}: {counts['base']:,} parameters")
    by_path = ", ".join(
        f"{path} {count:,}"
        for path, count in counts.items()
        if count and path not in ("base", "total", "trainable", "quantizable")
    )
    print(f"trained: {counts['trainable']:,} ({by_path})")


def print_terms(terms: Mapping[str, int]) -> None:
    for name, size in terms.items():
        print(f"  {name:<22}{size / GIB:>9.3f} GiB")
    print(f"  {'total':<22}{total_bytes(terms) / GIB:>9.3f} GiB")
