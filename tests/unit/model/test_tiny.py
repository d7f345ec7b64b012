"""The tiny base checkpoint: complete, deterministic, and with the released one's switches and special tokens."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import DacModel

from ds_higgs.errors import UserError
from ds_higgs.model.loading import load_model, load_tokenizer, read_model_config, released_model_config, resolve_base
from ds_higgs.model.tiny import CODEC_FOLDER, write_tiny_base
from ds_higgs.model.tiny_tokenizer import SPECIAL_TOKENS


def hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_equal_seeds_give_equal_files_and_other_seeds_other_weights(tmp_path: Path):
    write_tiny_base(tmp_path / "base", seed=0)
    torch.manual_seed(1)
    write_tiny_base(tmp_path / "again", seed=0)
    write_tiny_base(tmp_path / "other", seed=1)
    expected, other = hash_files(tmp_path / "base"), hash_files(tmp_path / "other")
    assert hash_files(tmp_path / "again") == expected
    assert other["model.safetensors"] != expected["model.safetensors"]
    assert other["tokenizer.json"] == expected["tokenizer.json"]


def test_writing_leaves_the_random_state_alone(tmp_path: Path):
    before = torch.random.get_rng_state()
    write_tiny_base(tmp_path / "base")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_tiny_base(tmp_path)


def test_switches_are_those_of_the_released_config(tiny_base: Path):
    tiny, released = read_model_config(resolve_base(str(tiny_base), None)), released_model_config()
    for key in (
        "audio_adapter_type",
        "encode_whisper_embed",
        "skip_audio_tower",
        "encode_audio_in_tokens",
        "use_delay_pattern",
        "audio_num_codebooks",
        "audio_codebook_size",
        "audio_stream_bos_id",
        "audio_stream_eos_id",
        "audio_embed_avg",
        "use_audio_out_embed_projector",
        "use_audio_out_self_attention",
        "audio_decoder_proj_num_layers",
    ):
        assert getattr(tiny, key) == getattr(released, key), key
    assert tiny.audio_dual_ffn_layers == list(range(tiny.text_config.num_hidden_layers))
    assert tiny.text_config.rope_scaling == released.text_config.rope_scaling


def test_special_tokens_are_single_ids_in_the_released_order(tiny_base: Path):
    tokenizer, config = load_tokenizer(tiny_base), read_model_config(tiny_base)
    first = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    encoded = tokenizer.encode("".join(SPECIAL_TOKENS), add_special_tokens=False)
    assert encoded == list(range(first, first + len(SPECIAL_TOKENS)))
    released = released_model_config()
    for key in ("audio_in_token_idx", "audio_out_token_idx", "audio_out_bos_token_id", "audio_eos_token_id"):
        assert getattr(config, key) - first == getattr(released, key) - 128000, key
    assert config.pad_token_id - first == released.pad_token_id - 128000
    assert config.text_config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("text", ["Hello, world.", "السَّلامُ عَلَيْكُم؟", "naïve 你好 🎤\n\t x", ""])
def test_any_text_survives_the_tokenizer(tiny_base: Path, text: str):
    tokenizer = load_tokenizer(tiny_base)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id


def test_codec_has_the_geometry_of_the_released_audio_tokenizer(tiny_base: Path):
    codec = DacModel.from_pretrained(tiny_base / CODEC_FOLDER).eval()
    waveform = torch.randn(1, 1, 24000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = codec.encode(waveform).audio_codes
        audio = codec.decode(audio_codes=codes).audio_values
    assert codes.shape == (1, 8, 25)
    assert 0 <= codes.min() <= codes.max() < 1024
    assert all(len(codebook.unique()) > 3 for codebook in codes[0])
    assert audio.shape[-1] == pytest.approx(24000, abs=960)


def test_whisper_option_adds_the_audio_tower(tmp_path: Path):
    write_tiny_base(tmp_path / "base", whisper=True)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    assert model.config.encode_whisper_embed
    assert model.audio_tower is not None
