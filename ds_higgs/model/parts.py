"""Parts of a HiggsAudioModel by the names that a configuration has for them, and the modules that they are."""

import re
from collections.abc import Mapping

from boson_multimodal.model.higgs_audio import HiggsAudioModel

# Module names inside HiggsAudioModel, matched whole: a bare `gate_proj` would be in both feed-forward paths, and the
# Whisper tower has layers of its own.
TARGETS: Mapping[str, str] = {
    "attention": r"layers\.\d+\.self_attn\.[qkvo]_proj",
    "text_ffn": r"layers\.\d+\.mlp\.(?:gate|up|down)_proj",
    "audio_ffn": r"layers\.\d+\.audio_mlp\.(?:gate|up|down)_proj",
}
WHOLE_PARTS: Mapping[str, str] = {
    "audio_head": r"audio_decoder_proj\.audio_lm_head",
    "audio_embeddings": r"audio_codebook_embeddings",
    "text_head": r"audio_decoder_proj\.text_lm_head",
    "audio_norms": r"layers\.\d+\.audio_\w*norm",
    **TARGETS,
}

_PATHS: Mapping[str, re.Pattern[str]] = {
    "attention": re.compile(r"(?<!audio_tower\.)layers\.\d+\.self_attn\."),
    "text_ffn": re.compile(r"(?<!audio_tower\.)layers\.\d+\.mlp\."),
    "audio_ffn": re.compile(r"(?<!audio_tower\.)layers\.\d+\.audio_mlp\."),
    "audio_norms": re.compile(r"(?<!audio_tower\.)layers\.\d+\.audio_\w*norm\."),
    "audio_head": re.compile(r"audio_decoder_proj\.audio_lm_head\."),
    "audio_embeddings": re.compile(r"audio_codebook_embeddings\."),
    "text_head": re.compile(r"audio_decoder_proj\.text_lm_head\."),
    "text_embeddings": re.compile(r"(?:^|\.)embed_tokens\."),
}
PATH_NAMES = (*_PATHS, "other")
_WHISPER = re.compile(r"audio_tower\..*|audio_encoder_proj\..*")


def path_of(parameter_name: str) -> str:
    """The part that a weight is of, or "other"; also of a weight that PEFT has added or copied."""
    return next((path for path, pattern in _PATHS.items() if pattern.search(parameter_name)), "other")


def is_used(model: HiggsAudioModel, parameter_name: str) -> bool:
    """Whether anything that the base does depends on a weight: Whisper's may lie there without being asked."""
    return model.config.encode_whisper_embed or not _WHISPER.fullmatch(parameter_name)
