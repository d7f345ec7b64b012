"""The step against plain code on the real model: it places the labels itself, and a loop runs over codebooks."""

import pytest
import torch
import torch.nn.functional as F

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.losses import LossWeights, build_targets
from ds_higgs.model.loading import load_model, load_tokenizer, read_model_config
from ds_higgs.model.lora import apply_lora
from ds_higgs.training.results import summarise
from ds_higgs.training.step_module import StepModule
from tests.support.batches import Sample, collate, make_batch

BATCHES = {
    "two samples": [Sample("one two three", (5,), (9,)), Sample("a", (3,), (4,))],
    "one sample, padded on the left": [Sample("one two three", (5,), (9,))],
    "several segments": [Sample("x y", (2, 3), (4, 1, 6)), Sample("z", (), (5,))],
    "reference turn masked": [Sample("x y", (4,), (7,), start_index=2, reference_in_assistant=True), Sample("q")],
    "no audio": [Sample("only text", (), ()), Sample("more of it", (), ())],
    "some without audio": [Sample("only text", (), ()), Sample("with audio", (3,), (8,))],
    "audio-in alone": [Sample("what is said?", (6,), ())],
}
# Of a run that weighs the first codebooks most; they do not sum to 1.
CODEBOOK_WEIGHTS = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)


@pytest.fixture(scope="module")
def base(tiny_base):
    tokenizer, config = load_tokenizer(tiny_base), read_model_config(tiny_base)
    model = load_model(tiny_base, dtype=torch.float32)
    torch.manual_seed(0)
    peft_model = apply_lora(model, rank=4, alpha=8, dropout=0.0, targets=("attention", "text_ffn", "audio_ffn"))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return tokenizer, config, peft_model


def plain_losses(model, collated):
    """As written from the definition: the model places the text labels, one loss per codebook in a loop."""
    inputs = {name: value for name, value in vars(collated).items() if name not in ("label_audio_ids", "reward")}
    outputs = model(**inputs, use_cache=False)
    logits, labels = outputs.logits[:, :-1], outputs.expanded_labels[:, 1:]
    supervised = labels != IGNORE_INDEX
    text = F.cross_entropy(logits[supervised], labels[supervised]) if supervised.any() else torch.tensor(0.0)
    codebooks = []
    for c in range(outputs.audio_logits.shape[1]):
        if collated.label_audio_ids.numel() == 0:
            codebooks.append(torch.tensor(0.0))
            continue
        target = collated.label_audio_ids[c, 1:]
        some = (target != IGNORE_INDEX).any()
        codebooks.append(F.cross_entropy(outputs.audio_logits[:-1, c], target) if some else torch.tensor(0.0))
    return text, torch.stack(codebooks)


@pytest.mark.parametrize("supervised_heads", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_equal_plain_code(base, name, supervised_heads):
    tokenizer, config, peft_model = base
    samples = BATCHES[name]
    module = StepModule(peft_model, supervised_heads=supervised_heads)
    weights = LossWeights.build(text=0.5, audio=2.0, codebooks=CODEBOOK_WEIGHTS, num_codebooks=8)
    batch = make_batch(samples, tokenizer, config)
    targets = build_targets(batch, placeholder_ids=module.placeholder_ids)
    counts = targets.counts()

    peft_model.zero_grad()
    text, codebooks = plain_losses(module.higgs, collate(samples, tokenizer, config))
    plain_loss = 0.5 * text + 2.0 * (codebooks * torch.tensor(CODEBOOK_WEIGHTS)).sum() / sum(CODEBOOK_WEIGHTS)
    plain_loss.backward()
    expected = [parameter.grad.clone() for parameter in peft_model.parameters() if parameter.requires_grad]

    peft_model.zero_grad()
    output = module(batch.model_inputs, targets, weights.scales(counts).float())
    output.loss.backward()
    result = summarise(output.sums.tolist(), counts.tolist(), weights)

    assert result.text_loss == pytest.approx(text.item(), rel=1e-5)
    assert result.audio_loss_per_codebook == pytest.approx(codebooks.tolist(), rel=1e-5)
    assert result.loss == pytest.approx(plain_loss.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
    found = [parameter.grad for parameter in peft_model.parameters() if parameter.requires_grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert sum(grad.abs().sum() for grad in expected) > 0


def test_single_scores_are_what_the_sums_are_made_of(base):
    """As validation asks for them, whichever way the heads run; the step's weight of the end is not in them."""
    tokenizer, config, peft_model = base
    batch = make_batch(BATCHES["several segments"], tokenizer, config)
    for supervised_heads in (True, False):
        module = StepModule(peft_model, supervised_heads=supervised_heads, end_weight=3.0)
        targets = build_targets(batch, placeholder_ids=module.placeholder_ids)
        scores = module(batch.model_inputs, targets, None)
        sums = module(batch.model_inputs, targets, torch.ones(9)).sums
        at_end = scores.audio * (targets.audio_labels.t() == config.audio_stream_eos_id)
        assert sums[0].item() == pytest.approx(scores.text.sum().item(), rel=1e-5)
        assert sums[1:].tolist() == pytest.approx((scores.audio + 2 * at_end).sum(dim=0).tolist(), rel=1e-5)
        losses_at_end = scores.audio[:, 0][targets.audio_labels[0] == config.audio_stream_eos_id]
        ends = scores.end[targets.audio_labels[0] == config.audio_stream_eos_id]
        assert (-ends.log()).tolist() == pytest.approx(losses_at_end.tolist(), rel=1e-4)


def test_masked_reference_turn_has_no_audio_targets(base):
    tokenizer, config, _ = base
    frames = 7
    masked = make_batch(BATCHES["reference turn masked"][:1], tokenizer, config)
    targets = build_targets(masked, placeholder_ids=(config.audio_in_token_idx, config.audio_out_token_idx))
    # each codebook: the clip's codes and one end of stream; nothing of the reference turn
    assert targets.counts()[1:].tolist() == [frames + 1] * 8
