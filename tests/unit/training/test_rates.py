"""Which weight learns at which rate, by the names of a real model."""

from torch import nn

from ds_higgs.model.loading import build_meta_model, read_model_config
from ds_higgs.model.lora import apply_lora
from ds_higgs.model.trained import make_trainable
from ds_higgs.training.rates import parameter_groups


def rates(model: nn.Module, **settings) -> dict[str, float]:
    """By name, over the configured rate of 2."""
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = parameter_groups(
        named.items(), learning_rate=2.0, num_layers=4, **{"loraplus_lr_ratio": 1.0, "layer_decay": 1.0, **settings}
    )
    assert groups[0]["lr"] == 2 or settings.get("loraplus_lr_ratio", 1) * settings.get("layer_decay", 1) != 1
    names = {id(weight): name for name, weight in named.items()}
    found = {names[id(weight)]: group["lr"] / 2 for group in groups for weight in group["params"]}
    assert found.keys() == named.keys()
    return found


def test_lora_plus(tiny_base):
    settings = {"rank": 2, "alpha": 4, "dropout": 0.0, "modules_to_save": ["audio_head"]}
    model = apply_lora(build_meta_model(read_model_config(tiny_base)), targets=["attention", "audio_ffn"], **settings)
    for name, rate in rates(model, loraplus_lr_ratio=16).items():
        assert rate == (16 if ".lora_B." in name else 1), name


def test_what_is_trained_whole_beside_lora_has_a_rate_of_its_own(tiny_base):
    settings = {"rank": 2, "alpha": 4, "dropout": 0.0, "modules_to_save": ["audio_ffn", "audio_embeddings"]}
    model = apply_lora(build_meta_model(read_model_config(tiny_base)), targets=["attention"], **settings)
    for name, rate in rates(model, whole_learning_rate=0.02).items():
        assert rate == (0.01 if ".audio_" in name else 1), name
    found = rates(model, whole_learning_rate=0.02, layer_decay=0.5, loraplus_lr_ratio=32)
    prefix, copy = "base_model.model.", "modules_to_save.default.weight"
    assert found[f"{prefix}layers.2.audio_mlp.up_proj.{copy}"] == 0.01 * 0.5**2
    assert found[f"{prefix}audio_codebook_embeddings.{copy}"] == 0.01 * 0.5**5
    assert found[f"{prefix}layers.0.self_attn.q_proj.lora_B.default.weight"] == 32 * 0.5**4


def test_layers_learn_slower_towards_the_bottom(tiny_base):
    model = make_trainable(build_meta_model(read_model_config(tiny_base)), mode="full", only=None, lora={})
    found = rates(model, layer_decay=0.5)
    assert found["audio_decoder_proj.audio_lm_head.weight"] == found["norm.weight"] == 1
    assert found["layers.3.audio_mlp.up_proj.weight"] == found["layers.3.input_layernorm.weight"] == 0.5
    assert found["layers.0.self_attn.q_proj.weight"] == 0.5**4
    assert found["embed_tokens.weight"] == found["audio_codebook_embeddings.weight"] == 0.5**5


def test_one_rate_is_no_group(tiny_base):
    weights = list(build_meta_model(read_model_config(tiny_base)).named_parameters())
    settings = {"learning_rate": 2.0, "loraplus_lr_ratio": 16.0, "layer_decay": 1.0, "num_layers": 4}
    assert [id(one) for one in parameter_groups(weights, **settings)] == [id(weight) for _, weight in weights]
