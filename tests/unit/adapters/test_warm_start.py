"""A run that starts from what another one trained has its weights, and trains what it would without."""

from pathlib import Path

import pytest
import torch

from ds_higgs.adapters.merging import load_adapter, merge_adapter
from ds_higgs.adapters.warm_start import start_from
from ds_higgs.adapters.whole import WholeInfo, write_whole
from ds_higgs.errors import UserError
from ds_higgs.model.loading import load_model
from ds_higgs.model.lora import apply_lora
from ds_higgs.model.trained import select_weights


def write_adapter(base: Path, folder: Path, targets: list[str], whole: tuple[str, ...] = ()) -> Path:
    model = apply_lora(
        load_model(base, dtype=torch.bfloat16),
        rank=2,
        alpha=4,
        dropout=0.1,
        targets=targets,
        modules_to_save=["audio_head", *whole],
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def write_weights(base: Path, folder: Path, changed: str) -> Path:
    """What a run of mode full hands out in which one weight has changed."""
    weights = load_model(base, dtype=torch.bfloat16).state_dict()
    weights[changed] = weights[changed] + 1
    folder.mkdir()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    info = WholeInfo(mode="full", base=str(base), revision=None)
    write_whole(folder, info, weights.items(), shapes=shapes, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize("parts", [(["attention", "audio_ffn"], ()), (["attention"], ("audio_ffn", "audio_norms"))])
def test_an_adapter_is_merged_and_the_same_weights_are_trained(tiny_base, tmp_path, parts):
    adapter = write_adapter(tiny_base, tmp_path / "adapter", *parts)
    base = load_model(tiny_base, dtype=torch.bfloat16)
    expected = merge_adapter(load_adapter(load_model(tiny_base, dtype=torch.bfloat16), adapter), dtype=base.dtype)
    started = start_from(load_model(tiny_base, dtype=torch.bfloat16), adapter, mode="full", only=None)
    assert started.training
    assert select_weights(started, mode="full") == select_weights(base, mode="full")
    changed = set()
    for name, weight in expected.state_dict().items():
        assert torch.equal(started.state_dict()[name], weight), name
        if not torch.equal(weight, base.state_dict()[name]):
            changed.add(name)
    expected_ones = ("layers.0.self_attn.q_proj", "layers.0.audio_mlp.up_proj", "audio_decoder_proj.audio_lm_head")
    assert {f"{name}.weight" for name in expected_ones} < changed
    assert ("layers.3.audio_input_layernorm.weight" in changed) == bool(parts[1])


def test_what_the_run_does_not_train_may_not_change(tiny_base, tmp_path):
    """An attention adapter under the audio path: what the run hands out would be without it."""
    model = load_model(tiny_base, dtype=torch.bfloat16)
    attention = write_adapter(tiny_base, tmp_path / "attention", ["attention"])
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.k_proj\.weight, .*export .*attention --merge"):
        start_from(model, attention, mode="audio_path", only=None)
    start_from(model, write_adapter(tiny_base, tmp_path / "audio", ["audio_ffn"]), mode="audio_path", only=None)


def test_weights_of_another_run(tiny_base, tmp_path):
    audio, text = "layers.1.audio_mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"
    base = load_model(tiny_base, dtype=torch.bfloat16).state_dict()
    model = load_model(tiny_base, dtype=torch.bfloat16)
    start_from(model, write_weights(tiny_base, tmp_path / "audio", audio), mode="audio_path", only=None)
    assert {name for name, weight in model.state_dict().items() if not torch.equal(weight, base[name])} == {audio}
    with pytest.raises(UserError, match=rf"\(1: {text}\)"):
        start_from(model, write_weights(tiny_base, tmp_path / "text", text), mode="audio_path", only=None)
    with pytest.raises(UserError, match="not the folder of a run"):
        start_from(model, tmp_path, mode="full", only=None)


def test_an_exported_model(tiny_base):
    model = load_model(tiny_base, dtype=torch.bfloat16)
    with torch.no_grad():
        model.layers[0].audio_mlp.up_proj.weight.add_(1)
    start_from(model, tiny_base, mode="audio_path", only=None)
    for name, weight in load_model(tiny_base, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
