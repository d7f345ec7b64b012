"""Peak memory of a training step on one GPU, term by term, from shapes alone."""

from collections.abc import Mapping

from ds_higgs.sizing.activations import fullest_moment
from ds_higgs.sizing.inputs import FP32, BatchShape, ModelShape, Policy

GIB = 2**30
CUDA_CONTEXT_BYTES = int(0.9 * GIB)  # context, cuBLAS workspace, NCCL buffers
# Of a weight: two in fp32; two of a byte each, with an fp32 scale for 256 of them; Muon's momentum, and the next one.
MOMENT_BYTES = {"adamw": 2 * FP32, "adamw_8bit": 2 + 2 * FP32 / 256, "muon": 2 * FP32}
FRAGMENTATION = 0.03  # of what comes and goes: assumed, not measured


def estimate_memory(
    model: ModelShape,
    batch: BatchShape,
    policy: Policy,
    *,
    frozen: int,
    trainable: int,
    quantizable: int = 0,
    largest: int = 0,
) -> dict[str, int]:
    """Bytes on one GPU at the peak of a step, by term.

    Args:
        frozen, trainable: numbers of parameters.
        largest: of the trained tensors, in elements.
        quantizable: how many of the frozen ones `model.quantization` packs into 4 bits, or has in fp8 too.
    """
    peak = fullest_moment(model, batch, policy, trainable=trainable, frozen=frozen, largest=largest)
    return {
        **_weight_terms(policy, frozen=frozen, trainable=trainable, quantizable=quantizable),
        "gradients": peak.gradients + _gradient_buffer(policy, trainable),
        "communication buckets": _bucket_bytes(policy),
        "activations": peak.kept,
        "working space": peak.work,
        "fragmentation": round(FRAGMENTATION * (peak.kept + peak.work)) if policy.cuda else 0,
        "framework": CUDA_CONTEXT_BYTES if policy.cuda else 0,
    }


def _weight_terms(policy: Policy, *, frozen: int, trainable: int, quantizable: int) -> dict[str, int]:
    split_weights = policy.world_size if policy.zero_stage == 3 else 1
    # nf4 with double quantization: half a byte and 0.127 bits a weight of scales. fp8: a byte for each direction more.
    element = policy.element_bytes
    bytes_each = {None: element, "nf4": 0.516, "fp8": element + 2}[policy.quantized]
    frozen_bytes = (frozen - quantizable) * element + round(quantizable * bytes_each)
    plain_optimizer = policy.zero_stage == 0 and policy.element_bytes == FP32
    terms = {
        "frozen weights": frozen_bytes // split_weights,
        "trained weights": trainable * policy.element_bytes // split_weights,
        "master weights": 0 if plain_optimizer else _share_of_states(policy, FP32 * trainable),
        "Adam moments": _share_of_states(policy, int(MOMENT_BYTES[policy.optimizer] * trainable)),
    }
    if policy.averaged:
        terms["averaged weights"] = _share_of_states(policy, FP32 * trainable)
    return terms


def _share_of_states(policy: Policy, of_all: int) -> int:
    """Bytes on one GPU of what ZeRO splits with the optimizer."""
    if policy.offload_optimizer:
        return 0
    return of_all // (policy.world_size if policy.zero_stage >= 1 else 1)


def _gradient_buffer(policy: Policy, trainable: int) -> int:
    """Where ZeRO-3 keeps a rank's share of the reduced gradients, all the time."""
    if policy.zero_stage != 3 or policy.offload_optimizer:
        return 0
    return trainable // policy.world_size * (FP32 if policy.fp32_reduction else policy.element_bytes)


def _bucket_bytes(policy: Policy) -> int:
    """DeepSpeed's buffer of a bucket, which is there all the time, with one rank too."""
    if policy.zero_stage == 0:
        return 0
    if policy.zero_stage == 3:
        return policy.reduce_bucket_elements * (FP32 if policy.fp32_reduction else policy.element_bytes)
    return (1 + policy.overlap_comm) * policy.element_bytes * policy.reduce_bucket_elements


def total_bytes(terms: Mapping[str, int]) -> int:
    """The sum of an estimate\'s terms."""
    return sum(terms.values())
