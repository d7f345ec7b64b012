"""Text and codebook cross-entropy as sums and counts; pure torch, no division, no synchronisation.

Both streams are next-token: position t predicts t + 1, and neither logits nor labels come shifted. The sums of all
ranks and accumulation steps are divided by the counts of the whole global batch in one place, `loss_scales`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_higgs.batch import IGNORE_INDEX, Batch
from ds_higgs.errors import UserError
from ds_higgs.module_calls import replaced_forward

T = TypeVar("T")
RowLoss = Callable[["Project", torch.Tensor, torch.Tensor], torch.Tensor]  # of rows and what they are to predict
Project = Callable[[torch.Tensor], torch.Tensor]  # hidden states [rows, hidden] to logits [rows, vocabulary]

# Presets of `loss.codebook_weights`: coarse codebooks first, which carry most of what is heard. "falling" is what a
# published trainer of this codec uses (k2-fsa/OmniVoice, `audio_codebook_weights`).
CODEBOOK_WEIGHTS = {"falling": (8, 8, 6, 6, 4, 4, 2, 2), "first": (8, 1, 1, 1, 1, 1, 1, 1)}

# Rows of fp32 text logits alive at once (128: 66 MB); a GPU takes as long to read the head's weights as for 200.
TEXT_CHUNK_ROWS = {"cpu": 128, "cuda": 256}


@dataclass(frozen=True)
class Targets:
    """What a micro-batch supervises, already shifted; built on the CPU, where the sizes are known without waiting.

    text_supervised: [num_text_tokens] bool, over the batch's text tokens (placeholders and padding left out) in
        row-major order: whether that token is a target. Expanding placeholders keeps this order, so it also places the
        targets in the expanded sequence, whatever the padding.
    text_labels: [num_text_targets] int64, in the same order.
    audio_frames: [num_audio_rows] int64, the audio-out frames t for which some codebook has a label at t + 1.
    audio_labels: [codebooks, num_audio_rows] int64, those labels, IGNORE_INDEX where a codebook has none.
    num_audio_frames: audio-out frames of the batch, supervised or not.
    """

    text_supervised: torch.Tensor
    text_labels: torch.Tensor
    audio_frames: torch.Tensor
    audio_labels: torch.Tensor
    num_audio_frames: int

    def counts(self) -> torch.Tensor:
        """[1 + codebooks] float64: the number of text targets, then of audio targets of each codebook."""
        audio = (self.audio_labels != IGNORE_INDEX).sum(dim=1)
        return torch.cat([torch.tensor([self.text_labels.numel()], device=audio.device), audio]).double()

    def to(self, device: torch.device | str) -> "Targets":
        """Copy to `device`, asynchronously where the source is pinned."""
        return Targets(
            text_supervised=self.text_supervised.to(device, non_blocking=True),
            text_labels=self.text_labels.to(device, non_blocking=True),
            audio_frames=self.audio_frames.to(device, non_blocking=True),
            audio_labels=self.audio_labels.to(device, non_blocking=True),
            num_audio_frames=self.num_audio_frames,
        )


def build_targets(batch: Batch, *, placeholder_ids: Sequence[int]) -> Targets:
    """Shift the labels of a micro-batch and drop every position that supervises nothing.

    The first token of a sample is never a target: nothing precedes it. An audio segment begins with IGNORE_INDEX in
    every codebook, so the shift over the concatenated segments never makes one segment predict the next.

    Args:
        batch: on the CPU.
        placeholder_ids: token ids of <|AUDIO|> and <|AUDIO_OUT|>, which stand for frames and are no text targets.
    """
    text = batch.labels.text
    is_text = is_text_token(batch, placeholder_ids=placeholder_ids)
    supervised = text != IGNORE_INDEX
    supervised[:, 0] = False

    shifted = batch.labels.audio[:, 1:]  # [codebooks, frames - 1]
    audio_frames = (shifted != IGNORE_INDEX).any(dim=0).nonzero().flatten()
    return Targets(
        text_supervised=supervised[is_text],
        text_labels=text[is_text & supervised],
        audio_frames=audio_frames,
        audio_labels=shifted[:, audio_frames],
        num_audio_frames=batch.labels.audio.shape[1],
    )


def is_text_token(batch: Batch, *, placeholder_ids: Sequence[int]) -> torch.Tensor:
    """[batch, seq] bool: where a text token stands, and neither a placeholder of audio nor padding."""
    inputs = batch.model_inputs
    return inputs["attention_mask"].bool() & ~torch.isin(inputs["input_ids"], torch.tensor(placeholder_ids))


def text_source_rows(targets: Targets, text_mask: torch.Tensor) -> torch.Tensor:
    """Rows of the flattened expanded sequence that predict the text targets, in the order of `text_labels`.

    Args:
        text_mask: [batch, expanded_seq] bool, True where the expanded sequence holds a text token.

    Returns:
        [num_text_targets] int64 indices into [batch * expanded_seq].
    """
    is_target = torch.zeros_like(text_mask).masked_scatter(text_mask, targets.text_supervised)
    predicts_target = F.pad(is_target[:, 1:], (0, 1))
    return true_indices(predicts_target.flatten(), targets.text_labels.numel())


def audio_source_rows(targets: Targets, audio_out_mask: torch.Tensor) -> torch.Tensor:
    """Rows of the flattened expanded sequence that predict the audio targets: [num_audio_rows] int64.

    Args:
        audio_out_mask: [batch, expanded_seq] bool, True where the expanded sequence holds an audio-out frame.
    """
    return true_indices(audio_out_mask.flatten(), targets.num_audio_frames)[targets.audio_frames]


def true_indices(mask: torch.Tensor, count: int) -> torch.Tensor:
    """`mask.nonzero()` for a mask [n] that is known to hold `count` times True: no device synchronisation."""
    slots = torch.where(mask, mask.cumsum(0) - 1, count)
    positions = torch.arange(mask.numel(), device=mask.device)
    return positions.new_empty(count + 1).scatter_(0, slots, positions)[:count]


def text_loss_sum(
    hidden_rows: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    *,
    scale: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropy of `head(hidden_rows)` with `labels`, in fp32: [] fp32; see `head_loss_sum`.

    Args:
        hidden_rows: [rows, hidden], the final hidden states that predict a text target.
        labels: [rows] int64, no IGNORE_INDEX.
    """
    return head_loss_sum(hidden_rows, labels, head, _cross_entropy_sum, scale=scale, chunk_rows=chunk_rows)


def head_loss_sum(
    hidden_rows: torch.Tensor,
    targets: torch.Tensor,
    head: nn.Module,
    row_loss: RowLoss,
    *,
    scale: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Sum of a loss of `head(hidden_rows)`: [] fp32.

    At most `chunk_rows` rows of logits exist at a time. A frozen head gives its gradient along with the loss, so that
    nothing of it is kept or computed twice; one that learns is recomputed in the backward pass, chunk by chunk.

    The head is called once, whatever the number of chunks: ZeRO-3 gathers split weights around a module's call, so
    ranks with other numbers of targets would otherwise gather unequally often. A split head of several modules (LoRA
    on it) gets all rows in one chunk.

    Args:
        hidden_rows: [rows, hidden]; targets: [rows, ...], what each is to predict, without a gradient.
        row_loss: gives the sum over some of the rows.
        scale: [] fp32, what the caller multiplies the sum with, which is not done here. A frozen head's gradient is
            made with it from the start, and so rounded as in plain code.
    """
    chunk_rows = _rows_at_once(head, hidden_rows, chunk_rows)
    if hidden_rows.requires_grad and not any(weight.requires_grad for weight in head.parameters()):
        scale = hidden_rows.new_ones((), dtype=torch.float32) if scale is None else scale
        return _FrozenHeadLoss.apply(hidden_rows, targets, head, row_loss, scale, chunk_rows)
    compute = partial(_chunked_sum, targets=targets, row_loss=row_loss, chunk_rows=chunk_rows)
    return _in_one_call(head, compute, hidden_rows)


def _rows_at_once(head: nn.Module, hidden_rows: torch.Tensor, chunk_rows: int | None) -> int:
    """All rows for a head of several modules that ZeRO-3 splits: it gathers them at each call of each, on all ranks."""
    is_split = any(head.children()) and any(hasattr(weight, "ds_id") for weight in head.parameters())
    return max(1, hidden_rows.shape[0]) if is_split else chunk_rows or TEXT_CHUNK_ROWS.get(hidden_rows.device.type, 128)


def _in_one_call(head: nn.Module, compute: Callable[[Project, torch.Tensor], T], hidden_rows: torch.Tensor) -> T:
    """`compute(project, hidden_rows)` inside one call of `head`; `project` is what the head does, without its hooks."""
    with replaced_forward(head, partial(compute, head.forward)):
        return head(hidden_rows)


def _chunked_sum(
    project: Project, hidden_rows: torch.Tensor, *, targets: torch.Tensor, row_loss: RowLoss, chunk_rows: int
) -> torch.Tensor:
    chunks = list(zip(hidden_rows.split(chunk_rows), targets.split(chunk_rows), strict=True))
    if len(chunks) == 1:
        return row_loss(project, *chunks[0])
    return torch.stack([checkpoint(row_loss, project, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _chunked_sum_and_gradient(
    project: Project,
    hidden_rows: torch.Tensor,
    *,
    targets: torch.Tensor,
    row_loss: RowLoss,
    scale: torch.Tensor,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and `scale` times its gradient by the rows."""
    sums, gradients = [], []
    for rows, of_rows in zip(hidden_rows.split(chunk_rows), targets.split(chunk_rows), strict=True):
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            chunk_sum = row_loss(project, leaf, of_rows)
        gradients.append(torch.autograd.grad(chunk_sum, leaf, scale)[0])
        sums.append(chunk_sum.detach())
    return torch.stack(sums).sum(), torch.cat(gradients)


def _cross_entropy_sum(project: Project, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(project(rows).float(), labels, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss sum of a head without trainable weights; its gradient by the rows is made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_rows, targets, head, row_loss, scale, chunk_rows):
        settings = {"targets": targets, "row_loss": row_loss, "scale": scale, "chunk_rows": chunk_rows}
        compute = partial(_chunked_sum_and_gradient, **settings)
        loss_sum, gradient = _in_one_call(head, compute, hidden_rows.detach())
        ctx.save_for_backward(gradient, scale)
        return loss_sum

    @staticmethod
    def backward(ctx, grad_sum):
        gradient, scale = ctx.saved_tensors
        remaining = torch.where(scale == 0, scale, grad_sum / scale)  # 1 where the caller multiplies with `scale` alone
        return (gradient * remaining).to(gradient.dtype), None, None, None, None, None


@torch.no_grad()
def text_losses(
    hidden_rows: torch.Tensor, labels: torch.Tensor, head: nn.Module, *, chunk_rows: int | None = None
) -> torch.Tensor:
    """The cross-entropy of each row of `head(hidden_rows)` with its label, in fp32: [rows] fp32, without a gradient.

    The head is called as in `text_loss_sum`: once, and with `chunk_rows` rows of logits at a time.
    """
    chunk_rows = _rows_at_once(head, hidden_rows, chunk_rows)
    return _in_one_call(head, partial(_chunked_losses, labels=labels, chunk_rows=chunk_rows), hidden_rows)


def _chunked_losses(
    project: Project, hidden_rows: torch.Tensor, *, labels: torch.Tensor, chunk_rows: int
) -> torch.Tensor:
    chunks = zip(hidden_rows.split(chunk_rows), labels.split(chunk_rows), strict=True)
    return torch.cat([F.cross_entropy(project(rows).float(), targets, reduction="none") for rows, targets in chunks])


def audio_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of every label, in fp32 and in one call over the codebooks x rows axis.

    Args:
        logits: [rows, codebooks * codebook_size], the audio head's output.
        labels: [codebooks, rows] int64, IGNORE_INDEX where a codebook has no target.

    Returns:
        [rows, codebooks] fp32, 0 where there is no target.
    """
    codebooks, rows = labels.shape
    losses = F.cross_entropy(
        logits.float().reshape(rows * codebooks, logits.shape[-1] // codebooks),
        labels.t().reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return losses.view(rows, codebooks)


def audio_loss_sums(
    logits: torch.Tensor, labels: torch.Tensor, *, end_code: int | None = None, end_weight: float = 1.0
) -> torch.Tensor:
    """Sum of the cross-entropy of every codebook: [codebooks] fp32.

    Args:
        logits, labels: see `audio_losses`.
        end_code: the stream EOS, whose losses are multiplied with `end_weight`. The number of targets stays what it
            is, so the weight of one end against that of one code is `end_weight`.
    """
    losses = audio_losses(logits, labels)
    if end_code is not None and end_weight != 1:
        losses = torch.where(labels.t() == end_code, end_weight * losses, losses)
    return losses.sum(dim=0)


def normalised_codebook_weights(weights: Sequence[float] | str | None, num_codebooks: int) -> tuple[float, ...]:
    """Codebook weights that sum to 1; equal where none are given. A name is one of CODEBOOK_WEIGHTS, or "equal".

    Raises:
        UserError: there is not one for every codebook.
    """
    if weights is None or weights == "equal":
        return (1.0 / num_codebooks,) * num_codebooks
    if isinstance(weights, str):
        weights = CODEBOOK_WEIGHTS[weights]
    if len(weights) != num_codebooks:
        raise UserError(
            f"loss.codebook_weights: found {len(weights)}, the base checkpoint has {num_codebooks} codebooks"
        )
    return tuple(weight / sum(weights) for weight in weights)


def loss_scales(
    counts: torch.Tensor, *, text_weight: float, audio_weight: float, codebook_weights: Sequence[float]
) -> torch.Tensor:
    """What each loss sum is multiplied with: its weight over its number of targets in the whole global batch.

    This is the one place where a loss is normalised. A count of zero gives a term of zero, never NaN.

    Args:
        counts: [1 + codebooks], targets of the global batch (every rank, every accumulation step).
        codebook_weights: normalised to sum 1.

    Returns:
        [1 + codebooks] float64: `loss = (scales * [text_sum, *audio_sums]).sum()`.
    """
    weights = counts.new_tensor([text_weight, *(audio_weight * weight for weight in codebook_weights)])
    return weights / counts.clamp(min=1)


@dataclass(frozen=True)
class LossWeights:
    """`loss = text x text_loss + audio x sum of codebooks[c] x L_c`; `codebooks` sum to 1."""

    text: float
    audio: float
    codebooks: tuple[float, ...]

    @classmethod
    def build(
        cls, *, text: float, audio: float, codebooks: Sequence[float] | str | None, num_codebooks: int
    ) -> "LossWeights":
        """Raises UserError for another number of codebook weights than the model has codebooks."""
        return cls(text, audio, normalised_codebook_weights(codebooks, num_codebooks))

    def scales(self, counts: torch.Tensor) -> torch.Tensor:
        """See `loss_scales`."""
        return loss_scales(counts, text_weight=self.text, audio_weight=self.audio, codebook_weights=self.codebooks)
