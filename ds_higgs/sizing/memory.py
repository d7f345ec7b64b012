"""Peak memory of a training step on one GPU, term by term, from shapes alone.

What is kept for the backward pass is what `packed_rows`, `grouped_lora`, `layer_kernels` and torch's autograd keep: the
base weights are frozen, so their matrix products keep nothing, while LoRA keeps its (dropped-out) inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ds_higgs.losses import TEXT_CHUNK_ROWS

GIB = 2**30
FP32 = 4
CUDA_CONTEXT_BYTES = int(0.9 * GIB)  # context, cuBLAS workspace, NCCL buffers, allocator slack; on CUDA only


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a HiggsAudioModel that memory depends on."""

    hidden: int
    intermediate: int
    num_layers: int
    query_width: int
    key_width: int
    num_heads: int
    text_vocab: int
    audio_vocab: int  # codebooks x codes, specials included


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch: samples, positions that hold a token or frame, those of its longest sample, and loss rows."""

    num_samples: int
    positions: int
    longest: int
    text_rows: int
    audio_rows: int

    @classmethod
    def typical(cls, num_samples: int, positions_per_sample: int) -> "BatchShape":
        """Voice cloning: a tenth of the positions predicts text, 45 in 100 predict audio."""
        positions = num_samples * positions_per_sample
        return cls(num_samples, positions, positions_per_sample, round(0.10 * positions), round(0.45 * positions))


@dataclass(frozen=True)
class Policy:
    """What a step keeps and where: everything of the configuration that memory depends on."""

    element_bytes: int = 2
    zero_stage: int = 2
    world_size: int = 1
    offload_optimizer: bool = False
    overlap_comm: bool = False
    reduce_bucket_elements: int = 50_000_000
    fp32_reduction: bool = True
    gradient_accumulation_steps: int = 1
    checkpoint_every: int | None = None
    lora_rank: int = 16
    lora_dropout: float = 0.05
    kernels: str = "torch"  # or "plain", "liger"
    grouped_lora: bool = True
    supervised_heads: bool = True
    quantized: bool = False
    cuda: bool = True


def estimate_memory(
    model: ModelShape, batch: BatchShape, policy: Policy, *, frozen: int, trainable: int, quantizable: int = 0
) -> dict[str, int]:
    """Bytes on one GPU at the peak of a step, by term.

    Args:
        frozen, trainable: numbers of parameters.
        quantizable: how many of the frozen ones `model.quantization` packs into 4 bits.
    """
    weights = _weight_terms(policy, frozen=frozen, trainable=trainable, quantizable=quantizable)
    return {
        **weights,
        **_gradient_terms(policy, trainable),
        **_activation_terms(model, batch, policy),
        "framework": CUDA_CONTEXT_BYTES if policy.cuda else 0,
    }


def _weight_terms(policy: Policy, *, frozen: int, trainable: int, quantizable: int) -> dict[str, int]:
    split_weights = policy.world_size if policy.zero_stage == 3 else 1
    split_states = policy.world_size if policy.zero_stage >= 1 else 1
    packed = quantizable if policy.quantized else 0
    # nf4 with double quantization: half a byte and 0.127 bits a weight of scales.
    frozen_bytes = (frozen - packed) * policy.element_bytes + round(packed * 0.516)
    plain_optimizer = policy.zero_stage == 0 and policy.element_bytes == FP32
    states = 0 if policy.offload_optimizer else 2 * FP32 * trainable // split_states
    masters = 0 if policy.offload_optimizer or plain_optimizer else FP32 * trainable // split_states
    return {
        "frozen weights": frozen_bytes // split_weights,
        "trained weights": trainable * policy.element_bytes // split_weights,
        "master weights": masters,
        "Adam moments": states,
    }


def _gradient_terms(policy: Policy, trainable: int) -> dict[str, int]:
    """Whole gradients of one step (they are reduced once), their fp32 sums, and the communication bucket."""
    local = trainable * policy.element_bytes
    if policy.gradient_accumulation_steps > 1 and policy.element_bytes < FP32:
        local += FP32 * trainable
    bucket = 0
    if policy.zero_stage in (1, 2) and policy.world_size > 1:
        element = FP32 if policy.fp32_reduction else policy.element_bytes
        bucket = (1 + policy.overlap_comm) * element * min(policy.reduce_bucket_elements, trainable)
    return {"gradients": local, "communication buckets": bucket}


def _activation_terms(model: ModelShape, batch: BatchShape, policy: Policy) -> dict[str, int]:
    layer = _layer_bytes(model, batch, policy)
    layer_input = batch.positions * model.hidden * policy.element_bytes
    every = policy.checkpoint_every
    recomputed = 0 if every is None else -(-model.num_layers // every)
    kept = (model.num_layers - recomputed) * layer + recomputed * layer_input
    # The head's workspace is gone when the last layer's backward begins.
    last_layer = _layer_backward_bytes(model, batch, policy) + (layer if recomputed else 0)
    ends = _ends_bytes(model, batch, policy)
    return {"activations": kept + ends, "working space": max(_head_bytes(model, batch, policy), last_layer)}


def _layer_bytes(model: ModelShape, batch: BatchShape, policy: Policy) -> int:
    """What one decoder layer keeps for its backward pass."""
    rows, element = batch.positions, policy.element_bytes
    grid_rows = batch.num_samples * batch.longest
    plain = policy.kernels == "plain"
    norm_input = FP32 if plain else element  # the model's own norm keeps an fp32 copy
    norms = 2 * rows * (model.hidden * norm_input + FP32)
    attention = grid_rows * (2 * model.query_width + 2 * model.key_width) * element + grid_rows * model.num_heads * FP32
    swiglu = (3 if plain else 2) * rows * model.intermediate * element
    lora_outputs = 7 * rows * policy.lora_rank * element
    return norms + attention + swiglu + _lora_input_bytes(model, rows, policy) + lora_outputs


def _lora_input_bytes(model: ModelShape, rows: int, policy: Policy) -> int:
    """Inputs of the seven LoRA pairs, with dropout a copy and a mask each; pairs that are grouped share theirs.

    Grouped ones keep their A matrices side by side too: of query, key and value, and of gate and up in both paths.
    """
    shared = 2 * model.hidden + model.query_width + model.intermediate
    if policy.grouped_lora:
        copies = 7 * policy.lora_rank * model.hidden * policy.element_bytes
        return rows * shared * (policy.element_bytes + (policy.lora_dropout > 0)) + copies
    if policy.lora_dropout > 0:
        mask_bytes = 1 if policy.cuda else policy.element_bytes
        return rows * (shared + 3 * model.hidden) * (policy.element_bytes + mask_bytes)
    return rows * shared * policy.element_bytes


def _layer_backward_bytes(model: ModelShape, batch: BatchShape, policy: Policy) -> int:
    """Gradients alive together in a layer's backward pass: of the feed-forward's product, gate and up."""
    return batch.positions * (3 * model.intermediate + 2 * model.hidden) * policy.element_bytes


def _ends_bytes(model: ModelShape, batch: BatchShape, policy: Policy) -> int:
    """Before the first and after the last layer: embeddings, the unpacked grid, the last norm and the selected rows."""
    padded = -(-batch.longest // 8) * 8 * batch.num_samples
    norm_input = policy.element_bytes if policy.element_bytes == FP32 else FP32
    selected = (batch.text_rows + batch.audio_rows) * model.hidden * policy.element_bytes
    return padded * model.hidden * (policy.element_bytes + norm_input) + selected


def _head_bytes(model: ModelShape, batch: BatchShape, policy: Policy) -> int:
    """Logits and what cross-entropy makes of them, of the larger of the two heads.

    The text head's gradient is made chunk by chunk in the forward pass, and only the rows' gradients wait; with full
    logits the text's log-softmax waits while the audio head goes backward.
    """
    audio = batch.audio_rows * model.audio_vocab
    if policy.supervised_heads:
        text = min(batch.text_rows, TEXT_CHUNK_ROWS) * model.text_vocab
        waiting = batch.text_rows * model.hidden * policy.element_bytes
    else:
        text = batch.num_samples * batch.longest * model.text_vocab
        waiting = text * FP32
    return max(3 * FP32 * audio + waiting, 3 * FP32 * text)


def total_bytes(terms: Mapping[str, int]) -> int:
    return sum(terms.values())
