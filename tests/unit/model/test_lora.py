"""LoRA: which modules it reaches, what becomes trainable, and that adapters load into inference."""

from pathlib import Path

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel

from ds_higgs.errors import UserError
from ds_higgs.model.adapter_switch import AdapterSwitch
from ds_higgs.model.loading import load_model, released_model_config
from ds_higgs.model.lora import apply_lora, count_parameters, unwrap
from ds_higgs.model.tiny import write_tiny_base
from ds_higgs.model.whole_modules import release_originals

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
    counts = count_parameters(lora(released_on_meta(), ("attention",), modules_to_save=("audio_ffn", "audio_norms")))
    assert counts["audio_ffn"] == counts["whole_audio_ffn"] == 28 * 3 * 3072 * 8192
    assert counts["audio_norms"] == 28 * 2 * 3072


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
        (
            r"audio_decoder_proj\.audio_lm_head",
            "lora.modules_to_save both match audio_decoder_proj.audio_lm_head: expected",
        ),
    ],
)
def test_targets_that_cannot_work_are_refused(model: HiggsAudioModel, targets, message: str):
    with pytest.raises(UserError, match=message):
        lora(model, targets, modules_to_save=("audio_head",))


LAYERS = ("attention", "audio_ffn", "audio_norms")


def test_parts_of_layers_are_trained_whole_beside_lora(model: HiggsAudioModel):
    of_base = count_parameters(model)  # all of it can learn
    counts = count_parameters(lora(model, ("text_ffn",), modules_to_save=LAYERS))
    assert counts["base"] == of_base["base"]
    for part in LAYERS:
        assert counts[part] == of_base[part] > 0
    assert counts["whole_text_ffn"] == 0 < counts["text_ffn"]
    assert counts["trainable"] == sum(counts[part] for part in (*LAYERS, "text_ffn"))
    assert counts["total"] == counts["base"] + counts["trainable"]


def test_an_expression_says_which_modules_are_trained_whole(model: HiggsAudioModel):
    expression = r"layers\.[12]\.audio_(mlp\..*|.*norm)|audio_codebook_.*"
    names = lora_parents(lora(model, ("attention",), modules_to_save=expression))
    whole = {name.split(".modules_to_save.")[0] for name in names if ".modules_to_save." in name}
    norms, projections = ("input_layernorm", "post_attention_layernorm"), ("gate_proj", "up_proj", "down_proj")
    of_layer = [f"audio_{norm}" for norm in norms] + [f"audio_mlp.{projection}" for projection in projections]
    assert whole == {f"layers.{layer}.{name}" for layer in (1, 2) for name in of_layer} | {"audio_codebook_embeddings"}


def test_the_base_lets_go_of_what_is_trained_whole(model: HiggsAudioModel):
    peft_model = lora(model, ("text_ffn",), modules_to_save=LAYERS)
    before = count_parameters(peft_model)
    release_originals(peft_model)
    counts = count_parameters(peft_model)
    assert counts == before | {"total": before["total"] - sum(before[part] for part in LAYERS)}
    with pytest.raises(AssertionError, match="release_originals"):
        AdapterSwitch(peft_model)


@pytest.mark.parametrize(
    ("targets", "whole", "message"),
    [
        (("attention",), r"layers\.0\.audio_mlp", "no whole name of a module with weights matches"),
        (("attention",), "up_proj", "no whole name of a module with weights matches 'up_proj'"),
        (("attention",), r".*\.self_attn\.v_proj", r"both match layers.0.self_attn.v_proj, .* and 1 more: expected"),
        (r"layers\.1\..*q_proj", ("attention",), "both match layers.1.self_attn.q_proj: expected each module in one"),
        (("attention",), "norm", "ends of names, would take layers.0.audio_input_layernorm, .* for norm"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(model: HiggsAudioModel, targets, whole, message: str):
    with pytest.raises(UserError, match=f"lora.modules_to_save.*{message}"):
        lora(model, targets, modules_to_save=whole)


def test_weights_in_4_bits_are_not_trained_whole(model: HiggsAudioModel):
    projection = model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj lie in 4 bits"):
        lora(model, ("text_ffn",), modules_to_save=("attention",))


def test_what_the_base_does_not_hear_is_not_trained_whole(tmp_path: Path):
    write_tiny_base(tmp_path / "base", whisper=True)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    with pytest.raises(UserError, match=r"would take audio_tower.layers.0.self_attn.q_proj"):
        lora(model, ("text_ffn",), modules_to_save=("attention",))
    model.config.encode_whisper_embed = False
    names = lora_parents(lora(model, ("text_ffn",), modules_to_save=r".*layer_norm|.*audio_input_layernorm"))
    assert not [name for name in names if name.startswith("audio_tower")]


def test_a_whole_weight_beside_new_lora_has_the_gradient_of_the_bases_own(model: HiggsAudioModel, tiny_base: Path):
    plain = load_model(tiny_base, dtype=torch.float32)
    peft_model = lora(model, ("text_ffn",), modules_to_save=(*LAYERS, "audio_head", "audio_embeddings"), dropout=0.0)
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.tensor([[3, 40, 508, 511, 507, 9, 504]])
    for one in (plain, unwrap(peft_model)):
        codes = torch.randint(0, 1024, (8, 21), generator=generator.manual_seed(3))
        inputs = {"audio_out_ids": codes, "audio_out_ids_start": torch.tensor([0])}
        group = {"audio_out_ids_start_group_loc": torch.tensor([0])}
        outputs = one(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **inputs, **group)
        (outputs.logits.square().mean() + outputs.audio_logits.square().mean()).backward()
    of_base = dict(plain.named_parameters())
    whole = {name: weight for name, weight in peft_model.named_parameters() if ".modules_to_save." in name}
    assert len(whole) == 4 * (4 + 3 + 2) + 2
    for name, weight in whole.items():
        name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        torch.testing.assert_close(weight.grad, of_base[name].grad, rtol=1e-5, atol=1e-7)
        assert weight.grad.any(), name


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


@pytest.mark.parametrize(
    "variant",
    [{}, {"rslora": True}, {"dora": True}, {"targets": ("text_ffn",), "modules_to_save": (*ALL_MODULES, *LAYERS)}],
    ids=str,
)
def test_a_saved_adapter_gives_the_same_logits_in_inference(tiny_base: Path, tmp_path: Path, variant: dict):
    peft_model = lora(load_model(tiny_base, dtype=torch.float32), **{"modules_to_save": ALL_MODULES, **variant}).eval()
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
