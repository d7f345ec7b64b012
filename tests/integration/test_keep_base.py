"""`loss.keep_base`: KL to the base as plain code has it, exactly 0 at the start, refused where it cannot be had."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.config import Config
from ds_higgs.config.file import validate_config
from ds_higgs.errors import UserError
from ds_higgs.losses import LossWeights, build_targets
from ds_higgs.model.loading import load_tokenizer, read_model_config
from ds_higgs.training.keep_base import KeptBase
from ds_higgs.training.results import summarise_sources
from ds_higgs.training.step_module import StepModule
from tests.support.batches import Sample, collate, make_batch
from tests.support.parity import build_model, parity_config

SAMPLES = [Sample("one two three", (5,), (9,)), Sample("a", (3,), (4, 2))]
CODEBOOKS = tuple(number / 36 for number in (8, 7, 6, 5, 4, 3, 2, 1))
HEADS = ("audio_head", "audio_embeddings", "text_head")
ADAPTERS = {
    "plain": {},
    "heads and embeddings trained whole": {"modules_to_save": HEADS},
    "LoRA on the text head": {"targets": r"layers\.\d+\.self_attn\.[qk]_proj|.*text_lm_head", "modules_to_save": ()},
    "layers trained whole": {"targets": ("text_ffn",), "modules_to_save": ("attention", "audio_ffn", "audio_norms")},
    "DoRA": {"dora": True, "modules_to_save": ()},
}


def make_module(base: Path, lora: dict, *, new: bool = False, precision: str = "fp32") -> StepModule:
    """With an adapter that is new, or that has learned something."""
    config = parity_config(base, lora={"modules_to_save": (), **lora}, keep=True, precision=precision)
    model = build_model(config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and new and "lora_B" in name:
            parameter.data.zero_()
        elif parameter.requires_grad and not new and "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return StepModule(model)


@pytest.fixture(scope="module")
def learned(tiny_base):
    """Adapters that have learned something, by name."""
    return cache(lambda adapter: make_module(tiny_base, ADAPTERS[adapter]))


@pytest.fixture(scope="module")
def material(tiny_base):
    tokenizer, config = load_tokenizer(tiny_base), read_model_config(tiny_base)
    return make_batch(SAMPLES, tokenizer, config), collate(SAMPLES, tokenizer, config)


def plain_divergences(module: StepModule, collated) -> tuple[torch.Tensor, torch.Tensor]:
    """As written from the definition: PEFT turns the adapter off, all logits are there, a loop runs over codebooks."""
    inputs = {name: value for name, value in vars(collated).items() if name not in ("label_audio_ids", "reward")}
    with torch.no_grad(), module.peft_model.disable_adapter():
        base = module.higgs(**inputs, use_cache=False)
    outputs = module.higgs(**inputs, use_cache=False)
    supervised = outputs.expanded_labels[:, 1:] != IGNORE_INDEX

    def divergence(logits, base_logits):
        logits, base_logits = logits.float().log_softmax(-1), base_logits.float().log_softmax(-1)
        return F.kl_div(logits, base_logits, log_target=True, reduction="batchmean")

    text = divergence(outputs.logits[:, :-1][supervised], base.logits[:, :-1][supervised])
    audio = []
    for codebook in range(8):
        some = collated.label_audio_ids[codebook, 1:] != IGNORE_INDEX
        audio.append(divergence(outputs.audio_logits[:-1, codebook][some], base.audio_logits[:-1, codebook][some]))
    return text, torch.stack(audio)


def kept(**changes) -> KeptBase:
    return replace(KeptBase(weight=0.3, text=True, audio=True, sources=None, codebooks=CODEBOOKS), **changes)


def step(module: StepModule, batch, keep: KeptBase):
    """The output, and what a step would tell of it; the losses themselves weigh nothing."""
    targets = build_targets(batch, placeholder_ids=module.placeholder_ids)
    counts = targets.counts().unsqueeze(0)
    output = module(batch.model_inputs, targets, torch.zeros(9), keep.scales(counts, times=1.0))
    weights = LossWeights.build(text=0.0, audio=0.0, codebooks=CODEBOOKS, num_codebooks=8)
    nothing = [0.0] * 9
    result = summarise_sources(nothing, counts.flatten().tolist(), weights, 1, extra=())
    return output, keep.add_to(result, output.divergences.double().unsqueeze(0), counts)


def gradients(module: StepModule) -> list[torch.Tensor]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    module.zero_grad()
    return found


@pytest.mark.parametrize("supervised_heads", [True, False])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_divergence_and_gradients_equal_plain_code(learned, material, adapter, supervised_heads):
    batch, collated = material
    module = StepModule(learned(adapter).peft_model, supervised_heads=supervised_heads)
    text, audio = plain_divergences(module, collated)
    plain = 0.3 * (text + (audio * torch.tensor(CODEBOOKS)).sum())
    plain.backward()
    expected = gradients(module)

    output, result = step(module, batch, kept())
    output.loss.backward()

    assert result.keep_base.text == pytest.approx(text.item(), rel=1e-4)
    assert result.keep_base.audio == pytest.approx((audio * torch.tensor(CODEBOOKS)).sum().item(), rel=1e-4)
    assert result.loss == pytest.approx(plain.item(), rel=1e-4)
    assert output.loss.item() == pytest.approx(plain.item(), rel=1e-4)
    assert min(text.item(), audio.min().item()) > 1e-6
    for one, other in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-7)
    assert sum(float(one.abs().sum()) for one in expected) > 0


@pytest.mark.parametrize("on", ["text", "audio"])
def test_it_is_taken_where_it_is_asked_for(learned, material, on):
    batch, collated = material
    module = learned("plain")
    text, audio = plain_divergences(module, collated)
    output, result = step(module, batch, kept(text=on == "text", audio=on == "audio"))
    expected = text.item() if on == "text" else (audio * torch.tensor(CODEBOOKS)).sum().item()
    assert output.loss.item() == pytest.approx(0.3 * expected, rel=1e-4)
    assert (result.keep_base.text is None) == (on == "audio")
    assert (result.keep_base.audio is None) == (on == "text")


@pytest.mark.parametrize(
    ("adapter", "precision"),
    [("plain", "fp32"), ("plain", "bf16"), ("heads and embeddings trained whole", "bf16"), ("DoRA", "fp32")],
)
def test_a_new_adapter_has_not_gone_from_its_base(tiny_base, material, adapter, precision):
    """Exactly, with dropout: it is in the adapter alone, and the base's forward draws nothing."""
    module = make_module(tiny_base, {**ADAPTERS[adapter], "dropout": 0.2}, new=True, precision=precision)
    module.train()
    torch.manual_seed(3)
    output, result = step(module, material[0], kept())
    assert output.divergences.tolist() == [0.0] * 9
    assert (result.keep_base.text, result.keep_base.audio, output.loss.item()) == (0.0, 0.0, 0.0)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    targets = build_targets(material[0], placeholder_ids=module.placeholder_ids)
    module(material[0].model_inputs, targets, torch.zeros(9))
    assert torch.equal(drawn, torch.rand(1))
    assert all(one.training for one in module.modules())
    assert all(getattr(one, "disable_adapters", False) is not True for one in module.modules())


def config_with(**sections) -> Config:
    values = {
        "run": {"output_dir": "out"},
        "model": {"base": "base"},
        "data": {"train_manifest": "train.json"},
        "loss": {"keep_base": {"weight": 0.1}},
    }
    return validate_config({**values, **sections}, source="test")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"mode": "audio_path"}}, "loss: keep_base needs train.mode lora: audio_path trains the base itself"),
        ({"zero": {"stage": 3}}, "zero: loss.keep_base needs stage 0, 1 or 2"),
        ({"loss": {"keep_base": {"weight": 0.1, "sources": ["replay"]}}}, "keep_base.sources: replay: no source"),
        ({"loss": {"keep_base": {"weight": 0}}}, "loss.keep_base.weight"),
        ({"loss": {"keep_base": {"on": "all"}}}, "loss.keep_base.weight: missing"),
    ],
)
def test_what_it_cannot_be_exact_with_is_refused(sections, message):
    with pytest.raises(UserError, match=message):
        config_with(**sections)
    assert config_with().loss.keep_base.on == "all"
