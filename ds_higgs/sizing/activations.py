"""What a forward and backward pass holds in memory, at each moment that can be its fullest.

What is kept for the backward pass is what `packed_rows`, `grouped_lora`, `layer_kernels` and torch's autograd keep: the
base weights are frozen, so their matrix products keep nothing, while LoRA keeps its (dropped-out) inputs; weights that
are trained themselves keep theirs. Layers give
back what they kept as the backward pass goes down, so the fullest moment is at the heads, in the last layer, or in the
first one, when all gradients are there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_higgs.losses import TEXT_CHUNK_ROWS
from ds_higgs.model.fused_layer import LEAST_ROWS
from ds_higgs.sizing.inputs import FP32, BatchShape, ModelShape, Policy

# Rows of the feed-forward's width alive in SwiGLU's backward pass: its own gradient and what each way makes of it.
SWIGLU_BACKWARD = {"torch": 4, "plain": 3, "liger": 1}
# Of the logits in fp32, for the divergence from the base: both sides' log-probabilities, its terms, their gradient.
KEPT_COPIES = 4
# Of projections that share an input: LoRA's, copied side by side.
A_MATRICES = {"attention": 3, "text_ffn": 2, "audio_ffn": 2}
SUB_GROUP = 10**9  # elements that ZeRO-3 updates at once
ALL_REDUCE_BUCKET = 5 * 10**8  # elements that stage 0 reduces at once; it looks once a bucket is larger
LIVE_WEIGHTS = 10**9  # elements that ZeRO-3 keeps gathered in a forward and backward pass
FLASH_BLOCK = 128  # positions: what FlashAttention-2 rounds lengths up to in its workspace


@dataclass(frozen=True)
class Moment:
    """Bytes alive together: kept for the backward pass, needed by an operation, and the trained weights' gradients."""

    kept: int
    work: int
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.work + self.gradients


def fullest_moment(
    model: ModelShape, batch: BatchShape, policy: Policy, *, trainable: int, frozen: int, largest: int
) -> Moment:
    """The moment of a micro-batch at which most is alive.

    From the second micro-batch of a step on, the fp32 sums of the earlier ones' gradients are alive throughout.

    Args:
        trainable, frozen: numbers of weights; largest: of the trained tensors, in elements.
    """
    accumulates = policy.gradient_accumulation_steps > 1 and policy.element_bytes < FP32
    sums = FP32 * trainable if accumulates else 0
    gathered = min(LIVE_WEIGHTS, trainable + frozen) * policy.element_bytes if policy.zero_stage == 3 else 0
    moments = [replace(one, work=one.work + gathered) for one in _moments(model, batch, policy, trainable)]
    reduced = max(_reduction_bytes(policy, trainable, largest), _update_bytes(policy, trainable))
    fullest = max([*moments, Moment(0, 0, reduced)], key=lambda moment: moment.total)
    return Moment(fullest.kept, fullest.work, fullest.gradients + sums)


def fullest_of_passes(model: ModelShape, batch: BatchShape, policy: Policy, *, trainable: int) -> Moment:
    """The same of the forward and backward pass alone, before gradients are reduced and applied."""
    return max(_moments(model, batch, policy, trainable), key=lambda moment: moment.total)


def _moments(model: ModelShape, batch: BatchShape, policy: Policy, trainable: int) -> Iterator[Moment]:
    step = _Step(model, batch, policy)
    gradients = trainable * policy.element_bytes
    of_heads = policy.trained_heads * policy.element_bytes  # the first gradients, which stay
    yield from (replace(moment, gradients=of_heads) for moment in step.head_moments())
    below = step.kept_by_layers(model.num_layers - 1)
    for work in step.layer_work():
        yield Moment(below + step.layer() + step.rope(), work, of_heads)
        yield Moment(step.layer() + step.rope(), work, gradients)
    yield Moment(0, 0, gradients)


def _reduction_bytes(policy: Policy, trainable: int, largest: int) -> int:
    """Gradients while they are reduced, as counted in DeepSpeed 0.19.8, with one rank too.

    A rank's own are whole. Stage 2 gathers the rank's share in fp32; stage 3's lies in a buffer of its own (see
    `memory`). There are copies of the bucket that is under way, which at stage 0 has a size of its own; a tensor
    larger than a bucket is one by itself.
    """
    own, element = trainable * policy.element_bytes, policy.element_bytes
    reduced = FP32 if policy.fp32_reduction else element
    if policy.zero_stage == 0:
        copied = element + (reduced if reduced != element else 0)
        return own + copied * min(ALL_REDUCE_BUCKET + largest, trainable)
    bucket = min(policy.reduce_bucket_elements, trainable)
    if policy.zero_stage == 3:
        return own + 2 * reduced * max(bucket, largest)
    converted = reduced * max(bucket, largest) if reduced != element else 0
    gathered = FP32 * trainable // policy.world_size if policy.zero_stage == 2 and not policy.offload_optimizer else 0
    return own + gathered + element * bucket + converted


def _update_bytes(policy: Policy, trainable: int) -> int:
    """Gradients at the update: up to stage 1 the rank's own are there; a share, at stage 3 a part of it, in fp32."""
    own, share = trainable * policy.element_bytes, trainable // policy.world_size
    if policy.zero_stage == 0:
        return own + (FP32 * trainable if policy.element_bytes < FP32 else 0)
    if policy.offload_optimizer:
        return own
    if policy.zero_stage == 3:
        return FP32 * min(share, SUB_GROUP)
    return FP32 * share + (own if policy.zero_stage == 1 else 0)


@dataclass(frozen=True)
class _Step:
    """Sizes in bytes of the parts of one forward and backward pass."""

    model: ModelShape
    batch: BatchShape
    policy: Policy

    def rows(self, count: int, width: int) -> int:
        return count * width * self.policy.element_bytes

    def kept_by_layers(self, count: int) -> int:
        """What the first `count` layers keep: all of a layer's, or its input where the layer is recomputed."""
        every = self.policy.checkpoint_every
        recomputed = 0 if every is None else -(-count // every)
        return (count - recomputed) * self.layer() + recomputed * self.rows(self.batch.positions, self.model.hidden)

    def layer(self) -> int:
        """What one decoder layer keeps."""
        copies = sum(A_MATRICES[path] for path in self.policy.lora_paths) if self.policy.grouped_lora else 0
        grouped = copies * self.rows(self.policy.lora_rank, self.model.hidden)
        return self.attention() + self.feed_forwards() + grouped

    def attention(self) -> int:
        """The norm's input, query, key, value and output in the grid with a number a row, and LoRA's inputs."""
        model, cells = self.model, self.cells
        grid = self.rows(cells, 2 * model.query_width + 2 * model.key_width) + cells * model.num_heads * FP32
        positions = self.batch.positions
        return (
            self.norm(positions)
            + grid
            + self.inputs(positions, model.hidden, projections=3, path="attention")
            + self.attention_output(positions)
        )

    @property
    def cells(self) -> int:
        """Rows that attention works on."""
        return self.batch.positions if self.policy.varlen else self.batch.grid_cells

    def attention_output(self, rows: int) -> int:
        return self.inputs(rows, self.model.query_width, projections=1, path="attention")

    def feed_forwards(self) -> int:
        return self.feed_forward(self.num_text, "text_ffn") + self.feed_forward(self.batch.frames, "audio_ffn")

    @property
    def num_text(self) -> int:
        return self.batch.positions - self.batch.frames

    def feed_forward(self, rows: int, path: str) -> int:
        """The norm's input, gate and up (and the activated gate, in the model's own way), and LoRA's inputs."""
        widths = 3 if self.policy.kernels == "plain" else 2
        return (
            self.norm(rows)
            + self.rows(rows, widths * self.model.intermediate)
            + self.inputs(rows, self.model.hidden, projections=2, path=path)
            + self.down(rows, path)
        )

    def down(self, rows: int, path: str) -> int:
        return self.inputs(rows, self.model.intermediate, projections=1, path=path)

    def norm(self, rows: int) -> int:
        """The input, of which the model's own norm keeps an fp32 copy, and a number a row."""
        element = FP32 if self.policy.kernels == "plain" else self.policy.element_bytes
        return rows * (self.model.hidden * element + FP32)

    def inputs(self, rows: int, width: int, *, projections: int, path: str) -> int:
        """The input of trained weights; of LoRA A's outputs too, and, with dropout, a copy and a mask of each group."""
        policy = self.policy
        whole = self.rows(rows, width) if path in policy.whole_paths else 0
        if path not in policy.lora_paths:
            return whole
        outputs = self.rows(rows, projections * policy.lora_rank)
        if policy.lora_dropout == 0:
            return self.rows(rows, width) + outputs
        mask_bytes = 1 if policy.cuda or policy.grouped_lora else policy.element_bytes
        mask_bytes = 0 if policy.fused and self.batch.positions >= LEAST_ROWS else mask_bytes
        copies = 1 if policy.grouped_lora else projections
        return whole + copies * rows * width * (policy.element_bytes + mask_bytes) + outputs

    def rope(self) -> int:
        return 2 * self.rows(self.batch.positions, self.model.head_dim)

    def head_moments(self) -> Iterator[Moment]:
        """Text logits and what cross-entropy makes of them, then the audio ones, with everything kept."""
        batch, hidden = self.batch, self.model.hidden
        kept = self.kept_by_layers(self.model.num_layers) + self.rope()
        norm_input = self.norm(batch.padded_positions)
        text_rows, audio_rows = (self.rows(count, hidden) for count in (batch.text_rows, batch.audio_rows))
        audio = (3 + KEPT_COPIES * self.policy.keeps_audio) * FP32 * batch.audio_rows * self.model.audio_vocab
        if self.policy.supervised_heads:  # the text's gradient is made in the forward pass, chunk by chunk
            logits = (
                min(batch.text_rows, TEXT_CHUNK_ROWS["cuda" if self.policy.cuda else "cpu"]) * self.model.text_vocab
            )
            normed = self.rows(batch.padded_positions, hidden)
            selected = normed + text_rows + audio_rows + self.of_base()
            copies_of_text = 3 + KEPT_COPIES * self.policy.keeps_text
            yield Moment(kept + norm_input, selected + copies_of_text * FP32 * logits)
            copies = self.rows(batch.audio_rows, self.model.audio_vocab) * (self.policy.element_bytes < FP32)
            yield Moment(kept + norm_input + text_rows, selected + 2 * audio // 3 + copies)
            yield Moment(kept + norm_input + text_rows, audio)
        else:  # the text's log-softmax waits while the audio head goes backward
            logits = batch.grid_cells * self.model.text_vocab
            kept += self.of_base()
            yield Moment(kept + norm_input, 3 * FP32 * logits)
            yield Moment(kept + norm_input, FP32 * logits + audio)

    def of_base(self) -> int:
        """What the base leaves, whose forward runs first: rows of hidden states for text, logits for audio."""
        policy, batch = self.policy, self.batch
        if not (policy.keeps_text or policy.keeps_audio):
            return 0
        width = self.model.hidden if policy.supervised_heads else self.model.text_vocab
        return self.rows(batch.text_rows, width) + self.rows(batch.audio_rows, self.model.audio_vocab)

    def layer_work(self) -> Iterator[int]:
        """What a layer's backward pass needs beyond what it kept, less what it has given back by then."""
        frames, text = self.batch.frames, self.num_text
        residual = self.rows(self.batch.positions, self.model.hidden)
        yield from (residual + work for work in self.feed_forward_work(frames, "audio_ffn"))
        given_back = self.feed_forward(frames, "audio_ffn") - self.rows(frames, self.model.hidden)
        yield from (residual + work - given_back for work in self.feed_forward_work(text, "text_ffn"))
        given_back = self.feed_forwards() + self.attention_output(self.batch.positions)
        yield residual + self.attention_work() - given_back

    def feed_forward_work(self, rows: int, path: str) -> Iterator[int]:
        """The down projection's two gradients; then SwiGLU's, when the down projection's input is no more."""
        width = self.model.intermediate
        cast = rows * width * (FP32 + 1) if self.policy.quantized == "fp8" else 0  # scaled in fp32, then rounded
        yield self.rows(rows, 2 * width) + cast
        yield self.rows(rows, SWIGLU_BACKWARD[self.policy.kernels] * width) - self.down(rows, path)

    def attention_work(self) -> int:
        """Gradients of the attention's output, query, key and value, and the flash kernel's own workspace."""
        model, cells = self.model, self.cells
        gradients = self.rows(cells, 2 * model.query_width + 2 * model.key_width)
        return gradients + flash_workspace(model, self.batch, self.policy)


def flash_workspace(model: ModelShape, batch: BatchShape, policy: Policy) -> int:
    """Bytes that FlashAttention-2's backward pass takes for itself, in one layer at a time.

    An fp32 sum for the query's gradient, a number a row and head, and, where heads share a key, its and the value's
    gradients for every head.
    """
    if not policy.cuda or policy.element_bytes == FP32:
        return 0
    length = batch.positions if policy.varlen else batch.longest  # without padding, all samples count as one
    rows = (1 if policy.varlen else batch.num_samples) * (-(-length // FLASH_BLOCK) * FLASH_BLOCK)
    shared = model.key_width < model.query_width
    cells = batch.positions if policy.varlen else batch.grid_cells
    expanded = 2 * cells * model.query_width * policy.element_bytes if shared else 0
    return rows * FP32 * (model.query_width + model.num_heads) + expanded
