"""The checkpoint format of transformers >= 5.3 (`higgs_audio_v2`): names and config, from and to the original one.

The two hold the same tensors under other names. What one of them can say and the other cannot is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boson_multimodal.model.higgs_audio import HiggsAudioConfig
from transformers import LlamaConfig

from ds_higgs.errors import UserError
from ds_higgs.files import read_json

MODEL_TYPE = "higgs_audio_v2"
ARCHITECTURE = "HiggsAudioV2ForConditionalGeneration"
_NATIVE_MODULE = "transformers.models.higgs_audio_v2.modeling_higgs_audio_v2"

# Beginnings of parameter names, original and native.
_NAMES = (
    ("audio_codebook_embeddings.", "model.embed_audio_tokens.embed_audio_tokens."),
    ("audio_decoder_proj.audio_lm_head.", "audio_lm_head."),
    ("audio_decoder_proj.text_lm_head.", "text_lm_head."),
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)
# Number of special entries in every codebook (stream BOS and EOS): counted by the native `codebook_size` only.
_NUM_STREAM_SPECIALS = 2
# What the native implementation does in every model, so what the original config has to ask for.
_REQUIRED_SWITCHES: Mapping[str, Any] = {
    "encode_whisper_embed": False,
    "encode_audio_in_tokens": True,
    "use_delay_pattern": True,
    "audio_embed_avg": False,
    "use_audio_out_embed_projector": False,
    "use_audio_out_self_attention": False,
    "use_rq_transformer": False,
    "audio_decoder_proj_num_layers": 0,
}
_SHARED_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)
_TOKEN_IDS = {
    "audio_in_token_idx": "<|AUDIO|>",
    "audio_out_token_idx": "<|AUDIO_OUT|>",
    "audio_out_bos_token_id": "<|audio_out_bos|>",
    "audio_eos_token_id": "<|audio_eos|>",
}


def to_native_name(name: str) -> str:
    """`layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj.weight`.

    Raises:
        KeyError: for a name that the native format has no place for.
    """
    return _replace_beginning(name, dict(_NAMES))


def to_original_name(name: str) -> str:
    """The inverse of `to_native_name`."""
    return _replace_beginning(name, {native: original for original, native in _NAMES})


def _replace_beginning(name: str, beginnings: Mapping[str, str]) -> str:
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(name)


def is_native(folder: Path) -> bool:
    """Whether `folder`/config.json is of the native format."""
    return read_json(folder / "config.json").get("model_type") == MODEL_TYPE


def to_native_config(config: HiggsAudioConfig, *, eos_token_id: int) -> dict[str, Any]:
    """The native config.json of a model with the original `config`.

    Args:
        eos_token_id: id of `<|eot_id|>`, with which the native `generate` ends a turn.

    Raises:
        UserError: if the native implementation cannot do what `config` asks for.
    """
    _check_has_native_form(config)
    text = config.text_config
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        **{key: getattr(text, key) for key in _SHARED_TEXT_KEYS},
        "rope_parameters": {"rope_type": "default", **(text.rope_scaling or {}), "rope_theta": text.rope_theta},
        "tie_word_embeddings": False,
        "num_codebooks": config.audio_num_codebooks,
        "codebook_size": config.audio_codebook_size + _NUM_STREAM_SPECIALS,
        "audio_token_id": config.audio_out_token_idx,
        "audio_bos_token_id": config.audio_out_bos_token_id,
        "audio_delay_token_id": delay_token_id(config),
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": eos_token_id,
    }


def delay_token_id(config: HiggsAudioConfig) -> int:
    """128014 in the released vocabulary: the reserved token between <|audio_out_bos|> and <|AUDIO|>."""
    return config.audio_out_bos_token_id + 1


def _check_has_native_form(config: HiggsAudioConfig) -> None:
    problems = [
        f"{key} is {getattr(config, key)}, expected {value}"
        for key, value in _REQUIRED_SWITCHES.items()
        if getattr(config, key) != value
    ]
    num_layers = config.text_config.num_hidden_layers
    if not config.audio_adapter_type.startswith("dual_ffn"):
        problems.append(f"audio_adapter_type is {config.audio_adapter_type}, expected dual_ffn_fast_forward")
    elif sorted(config.audio_dual_ffn_layers) != list(range(num_layers)):
        problems.append(f"audio_dual_ffn_layers is {config.audio_dual_ffn_layers}, expected all {num_layers} layers")
    if config.audio_ffn_intermediate_size != config.text_config.intermediate_size:
        problems.append("audio_ffn_intermediate_size differs from text_config.intermediate_size")
    if problems:
        raise UserError.from_problems(f"config.json: the format of transformers ({MODEL_TYPE}) cannot hold:", problems)


def read_original_config(folder: Path) -> HiggsAudioConfig:
    """The original config of the native checkpoint in `folder`, with the audio tokens' ids of its tokenizer."""
    return to_original_config(read_json(folder / "config.json"), token_ids=read_token_ids(folder))


def to_original_config(native: Mapping[str, Any], *, token_ids: Mapping[str, int]) -> HiggsAudioConfig:
    """The original config of a model with the native config.json `native`.

    Args:
        token_ids: id of every special token.
    """
    rope = dict(native["rope_parameters"])
    rope_theta = rope.pop("rope_theta")
    text_config = LlamaConfig(
        **{key: native[key] for key in _SHARED_TEXT_KEYS if key in native},
        rope_theta=rope_theta,
        rope_scaling=rope if rope["rope_type"] != "default" else None,
        bos_token_id=token_ids["<|begin_of_text|>"],
        eos_token_id=token_ids["<|end_of_text|>"],
    )
    return HiggsAudioConfig(
        text_config=text_config,
        architectures=["HiggsAudioModel"],
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(text_config.num_hidden_layers)),
        audio_ffn_hidden_size=text_config.hidden_size,
        audio_ffn_intermediate_size=text_config.intermediate_size,
        skip_audio_tower=True,
        **_REQUIRED_SWITCHES,
        audio_num_codebooks=native["num_codebooks"],
        audio_codebook_size=native["codebook_size"] - _NUM_STREAM_SPECIALS,
        audio_stream_bos_id=native["audio_stream_bos_id"],
        audio_stream_eos_id=native["audio_stream_eos_id"],
        **{key: token_ids[token] for key, token in _TOKEN_IDS.items()},
        pad_token_id=native["pad_token_id"],
        torch_dtype=native.get("dtype", native.get("torch_dtype")),
    )


def read_token_ids(folder: Path) -> dict[str, int]:
    """Ids of the added tokens in `folder`/tokenizer.json.

    Raises:
        UserError: if one that Higgs Audio needs is missing.
    """
    file = folder / "tokenizer.json"
    ids = {token["content"]: token["id"] for token in read_json(file).get("added_tokens", ())}
    needed = ("<|begin_of_text|>", "<|end_of_text|>", *_TOKEN_IDS.values())
    if missing := [token for token in needed if token not in ids]:
        raise UserError(f"{file}: not the tokenizer of Higgs Audio v2: it lacks {', '.join(missing)}")
    return ids


def to_native_adapter_name(name: str) -> str:
    """Rename one tensor of a PEFT adapter: `base_model.model.` + the module's name + `.lora_A.weight` and the like."""
    prefix = "base_model.model."
    return prefix + to_native_name(name.removeprefix(prefix))


def to_native_adapter_config(config: Mapping[str, Any], *, base: str) -> dict[str, Any]:
    """The adapter_config.json that puts the same adapter on the native model `base`."""
    target_modules = config["target_modules"]
    if not isinstance(target_modules, str):
        raise UserError("adapter_config.json: target_modules is a list, expected one regular expression")
    return {
        **config,
        "auto_mapping": {"base_model_class": ARCHITECTURE, "parent_library": _NATIVE_MODULE},
        "base_model_name_or_path": base,
        "revision": None,
        "target_modules": rf"model\.(?:{target_modules})",
        "modules_to_save": [to_native_name(f"{name}.").rstrip(".") for name in config["modules_to_save"] or ()] or None,
    }
