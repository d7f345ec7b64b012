"""The format of transformers >= 5.3, written and read back: same tensors, same config, same tokens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_higgs.adapters.native import save_native_model
from ds_higgs.errors import UserError
from ds_higgs.model import native_format
from ds_higgs.model.loading import load_model, load_tokenizer, read_model_config, released_model_config, resolve_base

END_OF_TURN = 504
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def native_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in the native format; read only."""
    folder = tmp_path_factory.mktemp("native") / "base"
    save_native_model(load_model(tiny_base, dtype=torch.float32), folder, eos_token_id=END_OF_TURN)
    for name in TOKENIZER_FILES:
        shutil.copy(tiny_base / name, folder)
    return folder


@pytest.fixture
def native_copy(native_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(native_base, tmp_path / "base"))


def test_every_name_goes_there_and_back(tiny_base: Path):
    names = load_file(tiny_base / "model.safetensors").keys()
    native = {native_format.to_native_name(name) for name in names}
    assert len(native) == len(names)
    assert {native_format.to_original_name(name) for name in native} == set(names)
    assert (
        native_format.to_native_name("layers.0.audio_mlp.up_proj.weight") == "model.layers.0.audio_mlp.up_proj.weight"
    )
    assert native_format.to_native_name("audio_codebook_embeddings.weight") == (
        "model.embed_audio_tokens.embed_audio_tokens.weight"
    )
    with pytest.raises(KeyError):
        native_format.to_native_name("audio_tower.conv1.weight")


def test_a_native_base_loads_as_the_original_one(tiny_base: Path, native_base: Path):
    original = load_model(tiny_base, dtype=torch.float32)
    converted = load_model(resolve_base(str(native_base), None), dtype=torch.float32)
    assert converted.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(converted.state_dict()[name], weight) for name, weight in original.state_dict().items())
    buffers = dict(converted.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in original.named_buffers())
    assert converted.config._attn_implementation == original.config._attn_implementation
    assert converted.training


def test_the_config_goes_there_and_back(tiny_base: Path, native_base: Path):
    original, converted = read_model_config(tiny_base).to_dict(), read_model_config(native_base).to_dict()
    no_matter = {"_name_or_path", "_attn_implementation_autoset", "audio_encoder_config", "transformers_version"}
    assert {key: converted[key] for key in original if key not in no_matter} == {
        key: original[key] for key in original if key not in no_matter
    }


def test_the_released_config_becomes_the_released_native_one():
    native = native_format.to_native_config(released_model_config(), eos_token_id=128009)
    assert native["codebook_size"] == 1026
    assert (native["audio_token_id"], native["audio_bos_token_id"], native["audio_delay_token_id"]) == (
        128016,
        128013,
        128014,
    )
    assert native["rope_parameters"]["rope_theta"] == 5e5


def test_the_tokenizer_of_a_native_base_is_read_past_its_class_name(tiny_base: Path, native_copy: Path):
    file = native_copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "TokenizersBackend"}))
    text = "<|audio_out_bos|>صباح الخير, good morning<|eot_id|>"
    assert load_tokenizer(native_copy).encode(text) == load_tokenizer(tiny_base).encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_delay_pattern": False}, "use_delay_pattern is False"),
        ({"encode_whisper_embed": True}, "encode_whisper_embed is True"),
        ({"audio_dual_ffn_layers": [0, 1]}, "expected all 4 layers"),
        ({"audio_ffn_intermediate_size": 64}, "audio_ffn_intermediate_size"),
    ],
)
def test_what_the_native_format_cannot_hold_is_refused(tiny_base: Path, change: dict, message: str):
    config = read_model_config(tiny_base)
    config.update(change)
    with pytest.raises(UserError, match=message):
        native_format.to_native_config(config, eos_token_id=END_OF_TURN)


def test_native_weights_that_do_not_fit_are_reported(native_copy: Path):
    weights = load_file(native_copy / "model.safetensors")
    del weights["text_lm_head.weight"]
    weights["stray"] = torch.ones(3)
    save_file(weights, native_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not in the model: stray\n.*missing: audio_decoder_proj.text_lm_head.weight"):
        load_model(native_copy, dtype=torch.float32)


def test_a_tokenizer_without_the_audio_tokens_is_refused(native_copy: Path):
    file = native_copy / "tokenizer.json"
    file.write_text(file.read_text().replace("<|AUDIO_OUT|>", "<|other|>"))
    with pytest.raises(UserError, match=r"lacks <\|AUDIO_OUT\|>"):
        read_model_config(native_copy)
