"""Losses against plain code: a loop over codebooks, full logits, labels placed by the model."""

import pytest
import torch
import torch.nn.functional as F

from ds_higgs.batch import IGNORE_INDEX, Batch, Labels, ModelInputs
from ds_higgs.losses import (
    audio_loss_sums,
    audio_losses,
    audio_source_rows,
    build_targets,
    loss_scales,
    normalised_codebook_weights,
    text_loss_sum,
    text_losses,
    text_source_rows,
    true_indices,
)

AUDIO_IN, AUDIO_OUT = 90, 91


def make_batch(input_ids, text_labels, audio_labels, attention_mask=None):
    input_ids = torch.tensor(input_ids)
    mask = torch.ones_like(input_ids) if attention_mask is None else torch.tensor(attention_mask)
    return Batch(
        model_inputs=ModelInputs(input_ids=input_ids, attention_mask=mask),
        labels=Labels(text=torch.tensor(text_labels), audio=torch.tensor(audio_labels, dtype=torch.long)),
        sample_ids=("a",),
        num_tokens=0,
    )


def build(batch):
    return build_targets(batch, placeholder_ids=(AUDIO_IN, AUDIO_OUT))


def plain_codebook_sums(logits, labels):
    """A loop over codebooks, as it would be written from the definition. logits [frames, C, V], labels [C, frames]."""
    sums, counts = [], []
    for c in range(labels.shape[0]):
        total, count = 0.0, 0
        for t in range(labels.shape[1] - 1):
            if labels[c, t + 1] != IGNORE_INDEX:
                total = total - torch.log_softmax(logits[t, c].double(), dim=-1)[labels[c, t + 1]]
                count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


@pytest.mark.parametrize(("codebooks", "frames", "vocab"), [(8, 23, 31), (3, 7, 1026), (1, 2, 5)])
def test_audio_sums_and_counts_equal_a_loop_over_codebooks(codebooks, frames, vocab):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(frames, codebooks, vocab, generator=generator)
    labels = torch.randint(0, vocab, (codebooks, frames), generator=generator)
    labels[torch.rand(codebooks, frames, generator=generator) < 0.4] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX
    targets = build(make_batch([[1, AUDIO_OUT, 2]], [[IGNORE_INDEX, IGNORE_INDEX, 2]], labels.tolist()))

    sums = audio_loss_sums(logits[targets.audio_frames].flatten(1), targets.audio_labels)

    plain_sums, plain_counts = plain_codebook_sums(logits, labels)
    torch.testing.assert_close(sums.double(), torch.stack([torch.as_tensor(s) for s in plain_sums]).double())
    assert targets.counts()[1:].tolist() == plain_counts
    unshifted, _ = plain_codebook_sums(torch.cat([logits[1:], logits[:1]]), labels)
    assert not torch.allclose(sums.double(), torch.stack([torch.as_tensor(s) for s in unshifted]).double())


def test_shift_does_not_cross_audio_segments():
    ignore = IGNORE_INDEX
    labels = [[ignore, 1, 2, ignore, 3, 4]]  # two segments of three frames, one codebook
    targets = build(make_batch([[1, AUDIO_OUT, AUDIO_OUT]], [[ignore] * 3], labels))
    assert targets.audio_frames.tolist() == [0, 1, 3, 4]  # frame 2 predicts nothing
    assert targets.audio_labels.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("left_padding", [False, True])
def test_text_targets_are_placed_in_the_expanded_sequence(left_padding):
    ignore = IGNORE_INDEX
    # Two samples: <1 2 OUT 3> and <4 IN 5>; OUT stands for 3 frames, IN for 2.
    batch = make_batch(
        [[1, 2, AUDIO_OUT, 3], [4, AUDIO_IN, 5, 0]],
        [[ignore, 2, AUDIO_OUT, 3], [ignore, ignore, 5, ignore]],
        [[ignore, 7, 8]],
        attention_mask=[[1, 1, 1, 1], [1, 1, 1, 0]],
    )
    text_rows = [[1, 1, 0, 0, 0, 1], [1, 0, 0, 1]]
    out_rows = [[0, 0, 1, 1, 1, 0], [0, 0, 0, 0]]

    def padded(rows):
        width = 8
        pad = [([0] * (width - len(row)) + row) if left_padding else (row + [0] * (width - len(row))) for row in rows]
        return torch.tensor(pad).bool()

    targets = build(batch)
    text = text_source_rows(targets, padded(text_rows)).tolist()
    audio = audio_source_rows(targets, padded(out_rows)).tolist()

    first, second = (2, 8 + 4) if left_padding else (0, 8)
    # label 2 from the position of 1; label 3 from the last frame; label 5 from the last audio-in frame
    assert text == [first + 0, first + 4, second + 2]
    assert targets.text_labels.tolist() == [2, 3, 5]
    assert audio == [first + 2, first + 3]
    assert targets.counts().tolist() == [3, 2]


def test_first_token_is_no_target():
    targets = build(make_batch([[1, 2]], [[1, 2]], [[IGNORE_INDEX]]))
    assert targets.text_labels.tolist() == [2]


def test_nothing_supervised_gives_zero_sums_with_a_gradient_path():
    targets = build(make_batch([[1, 2]], [[IGNORE_INDEX] * 2], [[]] * 8))
    assert targets.counts().tolist() == [0] * 9
    hidden = torch.zeros(0, 4, requires_grad=True)
    head = torch.nn.Linear(4, 8 * 5)
    audio = audio_loss_sums(head(hidden), targets.audio_labels)
    text = text_loss_sum(hidden, targets.text_labels, torch.nn.Linear(4, 11))
    (audio.sum() + text).backward()
    assert audio.tolist() == [0.0] * 8
    assert text.item() == 0.0
    assert head.weight.grad.abs().sum() == 0
    scales = loss_scales(targets.counts(), text_weight=1.0, audio_weight=1.0, codebook_weights=[1 / 8] * 8)
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 6, 13])
def test_text_sum_in_chunks_equals_one_call_and_its_gradients(rows, frozen):
    generator = torch.Generator().manual_seed(rows)
    head = torch.nn.Linear(7, 47, bias=False).requires_grad_(not frozen)
    hidden = torch.randn(rows, 7, generator=generator, requires_grad=True)
    labels = torch.randint(0, 47, (rows,), generator=generator)
    inputs = [hidden] if frozen else [hidden, head.weight]
    plain = F.cross_entropy(head(hidden), labels, reduction="sum")
    expected = torch.autograd.grad(3 * plain, inputs)

    chunked = text_loss_sum(hidden, labels, head, chunk_rows=5)

    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(torch.autograd.grad(3 * chunked, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remaining", [1.0, 0.25])
def test_a_frozen_heads_gradient_is_rounded_as_the_plain_one(dtype, remaining):
    head = torch.nn.Linear(7, 47, bias=False, dtype=dtype).requires_grad_(False)
    hidden, labels = torch.randn(13, 7, dtype=dtype, requires_grad=True), torch.arange(13)
    scale = torch.tensor(1 / 13)
    plain = scale * F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    (expected,) = torch.autograd.grad(plain * remaining, hidden)
    (gradient,) = torch.autograd.grad(remaining * scale * text_loss_sum(hidden, labels, head, scale=scale), hidden)
    assert torch.equal(gradient, expected)


def test_a_frozen_head_under_a_scale_of_zero_gets_a_gradient_of_zero():
    head = torch.nn.Linear(7, 47, bias=False).requires_grad_(False)
    hidden, scale = torch.randn(13, 7, requires_grad=True), torch.zeros(())
    (scale * text_loss_sum(hidden, torch.arange(13), head, scale=scale)).backward()
    assert torch.equal(hidden.grad, torch.zeros(13, 7))


class RecordingHead(torch.nn.Linear):
    """A head that tells how many rows it projects at a time."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes, bias=False)
        self.rows: list[int] = []

    def forward(self, hidden):
        self.rows.append(hidden.shape[0])
        return super().forward(hidden)


def test_a_frozen_head_is_run_once_and_keeps_no_logits():
    rows, vocab = 40, 1000
    head = RecordingHead(7, vocab).requires_grad_(False)
    hidden = torch.randn(rows, 7, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        loss = text_loss_sum(hidden, torch.zeros(rows).long(), head, chunk_rows=16)
    at_return = loss.grad_fn.saved_tensors
    loss.backward()
    assert head.rows == [16, 16, 8]
    assert [tensor.shape for tensor in at_return] == [(rows, 7), ()]
    assert max(kept) <= 16 * vocab


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows", [0, 5, 13])
def test_the_head_is_called_once_however_many_rows_there_are(rows, frozen):
    """ZeRO-3 gathers a split weight at every call of its module, so ranks with other numbers of targets may not differ.

    What a call returns carries a gradient, and is gathered for once more, only where the head learns.
    """
    head = RecordingHead(7, 47).requires_grad_(not frozen)
    hidden, calls = torch.randn(rows, 7, requires_grad=True), []

    def record(module, inputs, output):
        calls.append(any(one.requires_grad for one in (output if isinstance(output, tuple) else (output,))))

    recording = head.register_forward_hook(record)
    text_loss_sum(hidden, torch.zeros(rows).long(), head, chunk_rows=5).backward()
    recording.remove()
    assert calls == [not frozen]
    assert max(head.rows) <= 5
    assert head(hidden).shape == (rows, 47)  # its own forward is back


def test_without_gradients_the_sum_is_the_same():
    head = torch.nn.Linear(7, 47, bias=False)
    hidden, labels = torch.randn(13, 7), torch.arange(13)
    with torch.no_grad():
        chunked = text_loss_sum(hidden, labels, head, chunk_rows=5)
    torch.testing.assert_close(chunked, F.cross_entropy(head(hidden), labels, reduction="sum").detach())


def test_losses_are_in_fp32_for_bf16_logits():
    logits = torch.randn(3, 2 * 11).bfloat16()
    assert audio_loss_sums(logits, torch.zeros(2, 3).long()).dtype == torch.float32
    assert text_loss_sum(logits, torch.zeros(3).long(), torch.nn.Identity()).dtype == torch.float32


def test_the_end_weighs_more_and_the_other_codes_as_before():
    logits, labels = torch.randn(5, 2 * 11), torch.tensor([[1, 2, 9, -100, 9], [9, 3, 4, 5, -100]])
    plain = audio_losses(logits, labels)
    assert audio_loss_sums(logits, labels, end_code=9).tolist() == plain.sum(dim=0).tolist()
    weighed = audio_loss_sums(logits, labels, end_code=9, end_weight=3.0)
    assert weighed.tolist() == pytest.approx(
        [float(plain[:, 0].sum() + 2 * (plain[2, 0] + plain[4, 0])), float(plain[:, 1].sum() + 2 * plain[0, 1])]
    )


@pytest.mark.parametrize("rows", [0, 1, 5, 13])
def test_text_losses_are_those_that_are_summed_up(rows):
    head, hidden, labels = RecordingHead(7, 47), torch.randn(rows, 7, requires_grad=True), torch.arange(rows)
    single = text_losses(hidden, labels, head, chunk_rows=5)
    assert not single.requires_grad
    torch.testing.assert_close(single, F.cross_entropy(head(hidden), labels, reduction="none").detach())
    assert max(head.rows[:-1], default=0) <= 5


def test_scales_divide_by_the_global_counts():
    counts = torch.tensor([4, 10, 0], dtype=torch.float64)
    scales = loss_scales(counts, text_weight=2.0, audio_weight=3.0, codebook_weights=(0.25, 0.75))
    assert scales.tolist() == pytest.approx([2 / 4, 3 * 0.25 / 10, 3 * 0.75])


def test_codebook_weights_are_normalised():
    assert normalised_codebook_weights(None, 8) == (0.125,) * 8
    assert normalised_codebook_weights([1, 3], 2) == (0.25, 0.75)
    assert normalised_codebook_weights("equal", 4) == (0.25,) * 4
    assert normalised_codebook_weights("falling", 8) == tuple(weight / 40 for weight in (8, 8, 6, 6, 4, 4, 2, 2))
    assert normalised_codebook_weights("first", 8) == (8 / 15, *[1 / 15] * 7)


@pytest.mark.parametrize("size", [1, 8, 33])
def test_true_indices_equal_nonzero(size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    assert true_indices(mask, int(mask.sum())).tolist() == mask.nonzero().flatten().tolist()
