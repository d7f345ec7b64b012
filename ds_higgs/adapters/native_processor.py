"""What a native model's folder needs beside its weights to be spoken with: processor, chat template, codec pointer."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ds_higgs.files import read_json, write_json
from ds_higgs.model.loading import HiggsAudioConfig
from ds_higgs.model.native_format import delay_token_id

SAMPLING_RATE = 24_000
# The released codec in the format of transformers; boson's own repository has another one.
NATIVE_CODEC = "eustlb/higgs-audio-v2-tokenizer"
CHAT_TEMPLATE = "chat_template.jinja"


def save_native_processor(folder: Path, *, tokenizer: PreTrainedTokenizerBase, config: HiggsAudioConfig) -> None:
    """Write processor_config.json and the chat template into `folder`, which has the tokenizer's files already.

    A codec of transformers in `folder`/codec is pointed to by that relative path: it is found where the folder is the
    working directory. Any other codec gives way to the released one, on the hub.
    """
    write_json(folder / "processor_config.json", _processor_config(tokenizer, config, _codec_pointer(folder)))
    (folder / CHAT_TEMPLATE).write_text(chat_template(), encoding="utf-8")


def chat_template() -> str:
    """The Jinja template of the form in which servers ask."""
    return files(__package__).joinpath("native_chat_template.jinja").read_text(encoding="utf-8")


def _processor_config(
    tokenizer: PreTrainedTokenizerBase, config: HiggsAudioConfig, codec: dict[str, str]
) -> dict[str, Any]:
    return {
        "processor_class": "HiggsAudioV2Processor",
        "audio_token": config.audio_out_token,
        "audio_bos_token": config.audio_out_bos_token,
        "audio_eos_token": config.audio_eos_token,
        "audio_delay_token": tokenizer.convert_ids_to_tokens(delay_token_id(config)),
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "audio_tokenizer": codec,
        "feature_extractor": {
            "feature_extractor_type": "DacFeatureExtractor",
            "feature_size": 1,
            "hop_length": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": SAMPLING_RATE,
        },
    }


def _codec_pointer(folder: Path) -> dict[str, str]:
    file = folder / "codec" / "config.json"
    codec = read_json(file) if file.is_file() else {}
    if codec.get("model_type") != "dac":
        return _pointer("HiggsAudioV2TokenizerModel", NATIVE_CODEC)
    # The native processor asks for the number of codebooks by this name.
    write_json(file, codec | {"num_quantizers": codec["n_codebooks"]})
    return _pointer("DacModel", "codec")


def _pointer(kind: str, place: str) -> dict[str, str]:
    return {"audio_tokenizer_class": kind, "audio_tokenizer_name_or_path": place}
