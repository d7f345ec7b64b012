"""CPU memory that a run takes for its state, of rank 0's process, from shapes alone."""

from ds_higgs.sizing.inputs import FP32, Policy
from ds_higgs.sizing.memory import MOMENT_BYTES


def estimate_host_memory(policy: Policy, *, trainable: int) -> dict[str, int]:
    """Bytes by term; other ranks take no more. What is loaded, collated and reduced there is not among them.

    Args:
        trainable: number of trained weights.
    """
    split = policy.world_size if policy.zero_stage >= 1 else 1
    states = int((FP32 + MOMENT_BYTES[policy.optimizer] + FP32 * policy.averaged) * trainable) // split
    weights = policy.element_bytes * trainable
    plain_optimizer = policy.zero_stage == 0 and policy.element_bytes == FP32  # whose masters are the weights
    saved = states - FP32 * trainable * plain_optimizer + (weights if policy.zero_stage < 3 else 0)
    return {
        "offloaded optimizer": states if policy.offload_optimizer else 0,
        "copy of a checkpoint": saved if policy.async_saves else 0,
        "copy of the best": weights if policy.async_saves and policy.keeps_best else 0,
    }
