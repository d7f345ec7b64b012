"""LoRA: which modules it reaches, what becomes trainable, and that adapters load into inference."""

from pathlib import Path

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel

from ds_higgs.errors import UserError
from ds_higgs.model.loading import load_model, released_model_config
from ds_higgs.model.lora import apply_lora, count_parameters, unwrap
from ds_higgs.model.tiny import write_tiny_base

ALL_TARGETS = ("attention", "text_ffn", "audio_ffn")
ALL_MODULES = ("audio_head", "audio_embeddings", "text_head")


def lora(model: HiggsAudioModel, targets=ALL_TARGETS, **changes) -> PeftModel:
    settings = {"rank": 16, "alpha": 32, "dropout": 0.05, "modules_to_save": ()} | changes
    return apply_lora(model, targets=targets, **settings)


@pytest.fixture
def model(tiny_base: Path) -> HiggsAudioModel:
    return load_model(tiny_base, dtype=torch.float32)


def lora_parents(model: PeftModel) -> set[str]:
    return {
        name.removeprefix("base_model.model.").split(".lora_")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def released_on_meta() -> HiggsAudioModel:
    with torch.device("meta"):
        return HiggsAudioModel(released_model_config()).to(torch.bfloat16)


def test_released_model_has_the_known_parameter_counts():
    counts = count_parameters(lora(released_on_meta(), modules_to_save=("audio_head", "audio_embeddings")))
    assert counts["base"] == 5_771_283_456
    assert counts["attention"] == 9_175_040
    assert counts["text_ffn"] == 15_138_816
    assert counts["audio_ffn"] == 15_138_816
    assert counts["audio_head"] == counts["audio_embeddings"] == 25_214_976
    assert counts["trainable"] == 9_175_040 + 2 * 15_138_816 + 2 * 25_214_976
    assert counts["total"] == counts["base"] + counts["trainable"]
    assert counts["other"] == counts["text_head"] == 0


@pytest.mark.parametrize("targets", [("attention",), ("text_ffn",), ("audio_ffn",), ("attention", "audio_ffn")])
def test_each_path_can_be_chosen_alone(model: HiggsAudioModel, targets: tuple[str, ...]):
    counts = count_parameters(lora(model, targets))
    assert counts["trainable"] == sum(counts[path] for path in targets) > 0
    assert all(counts[path] > 0 for path in targets)


def test_a_regular_expression_matches_whole_names(model: HiggsAudioModel):
    peft_model = lora(model, r"layers\.[01]\.self_attn\.v_proj")
    assert lora_parents(peft_model) == {"layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"}


def test_the_whisper_tower_is_left_alone(tmp_path: Path):
    write_tiny_base(tmp_path / "base", whisper=True)
    whisper_model = load_model(tmp_path / "base", dtype=torch.float32)
    peft_model = lora(whisper_model)
    assert not [name for name in lora_parents(peft_model) if name.startswith("audio_tower")]


@pytest.mark.parametrize("name", ALL_MODULES)
def test_modules_to_save_are_trained_whole(model: HiggsAudioModel, name: str):
    counts = count_parameters(lora(model, modules_to_save=(name,)))
    expected = {"text_head": 512 * 128}.get(name, 8 * 1026 * 128)
    assert counts[name] == expected
    assert sum(counts[other] for other in ALL_MODULES if other != name) == 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("attention", "atention"), "found 'atention'"),
        ((), "is empty"),
        ("gate_proj", "no module's whole name matches"),
        ("layers.(", "not a regular expression"),
        (r"layers\.0\.self_attn", "expected a Linear or Embedding"),
        (r"audio_decoder_proj\.audio_lm_head", "lora.modules_to_save too"),
    ],
)
def test_targets_that_cannot_work_are_refused(model: HiggsAudioModel, targets, message: str):
    with pytest.raises(UserError, match=message):
        lora(model, targets, modules_to_save=("audio_head",))


def test_unknown_module_to_save_is_refused(model: HiggsAudioModel):
    with pytest.raises(UserError, match=r"lora.modules_to_save: found 'head'"):
        lora(model, modules_to_save=("head",))


def test_a_model_without_audio_ffn_is_refused():
    config = released_model_config()
    config.audio_adapter_type, config.text_config.num_hidden_layers = "stack", 1
    with torch.device("meta"):
        stacked = HiggsAudioModel(config)
    with pytest.raises(UserError, match="no audio_ffn layers"):
        lora(stacked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_models_dtype(tiny_base: Path, dtype: torch.dtype):
    peft_model = lora(load_model(tiny_base, dtype=dtype), modules_to_save=("audio_head",))
    assert {parameter.dtype for parameter in peft_model.parameters()} == {dtype}


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}])
def test_a_saved_adapter_gives_the_same_logits_in_inference(tiny_base: Path, tmp_path: Path, variant: dict[str, bool]):
    peft_model = lora(load_model(tiny_base, dtype=torch.float32), modules_to_save=ALL_MODULES, **variant).eval()
    assert isinstance(unwrap(peft_model), HiggsAudioModel)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peft_model.save_pretrained(tmp_path / "adapter")
    base = HiggsAudioModel.from_pretrained(tiny_base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = {"input_ids": torch.arange(20).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with torch.no_grad():
        expected, found = unwrap(peft_model)(**inputs).logits, unwrap(loaded)(**inputs).logits
        assert torch.equal(found, expected)
        assert not torch.allclose(HiggsAudioModel.from_pretrained(tiny_base).eval()(**inputs).logits, expected)


def test_paths_have_ranks_of_their_own(tiny_base):
    peft_model = lora(load_model(tiny_base, dtype=torch.float32), rank=4, targets={"attention": 2, "audio_ffn": 6})
    found = {name: weight.shape[0] for name, weight in peft_model.named_parameters() if ".lora_A." in name}
    assert found
    for name, rank in found.items():
        assert rank == (2 if "self_attn" in name else 6), name
    assert not any(".mlp." in name for name in found)
