"""Writes a tiny base checkpoint: the released one's architecture and switches, small enough to train on a CPU."""

from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioEncoderConfig, HiggsAudioModel
from transformers import DacConfig, DacModel, LlamaConfig, PreTrainedTokenizerBase

from ds_higgs.errors import UserError
from ds_higgs.files import settle_folder
from ds_higgs.model.tiny_tokenizer import build_tiny_tokenizer

CODEC_FOLDER = "codec"


def write_tiny_base(
    folder: Path,
    *,
    seed: int = 0,
    whisper: bool = False,
    hidden_size: int = 128,
    num_layers: int = 4,
    intermediate_size: int = 256,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
) -> None:
    """Write config.json, weights (fp32) and tokenizer files to `folder` and a small DAC codec to `folder/codec`.

    Equal arguments give equal files. With `whisper` the model has an audio tower, also for audio in user turns.

    Raises:
        UserError: if `folder` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; expected a new or empty folder for the tiny base checkpoint")
    tokenizer = build_tiny_tokenizer()
    config = build_tiny_config(
        tokenizer,
        whisper=whisper,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        HiggsAudioModel(config).save_pretrained(folder)
        torch.manual_seed(seed)
        DacModel(_tiny_codec_config()).save_pretrained(folder / CODEC_FOLDER)
    tokenizer.save_pretrained(folder)
    settle_folder(folder)


def build_tiny_config(
    tokenizer: PreTrainedTokenizerBase,
    *,
    whisper: bool,
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    codebook_size: int = 1024,
) -> HiggsAudioConfig:
    """The released config's switches at small sizes, with the ids of `tokenizer`."""

    def token_id(token: str) -> int:
        return tokenizer.get_vocab()[token]

    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        bos_token_id=token_id("<|begin_of_text|>"),
        eos_token_id=token_id("<|end_of_text|>"),
    )
    return HiggsAudioConfig(
        text_config=text_config,
        audio_encoder_config=_tiny_whisper_config(token_id("<|end_of_text|>")),
        audio_adapter_type="dual_ffn_fast_forward",
        audio_dual_ffn_layers=list(range(num_layers)),
        audio_ffn_hidden_size=hidden_size,
        audio_ffn_intermediate_size=intermediate_size,
        encode_whisper_embed=whisper,
        skip_audio_tower=not whisper,
        encode_audio_in_tokens=True,
        use_delay_pattern=True,
        audio_num_codebooks=8,
        audio_codebook_size=codebook_size,
        audio_stream_bos_id=codebook_size,
        audio_stream_eos_id=codebook_size + 1,
        audio_in_token_idx=token_id("<|AUDIO|>"),
        audio_out_token_idx=token_id("<|AUDIO_OUT|>"),
        audio_out_bos_token_id=token_id("<|audio_out_bos|>"),
        audio_eos_token_id=token_id("<|audio_eos|>"),
        pad_token_id=token_id("<|end_of_text|>"),
    )


def _tiny_whisper_config(pad_token_id: int) -> HiggsAudioEncoderConfig:
    """Mel input as large-v3 has it: 128 bins x 3000 frames."""
    return HiggsAudioEncoderConfig(
        num_mel_bins=128,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        d_model=32,
        pad_token_id=pad_token_id,
    )


def _tiny_codec_config() -> DacConfig:
    """24 kHz, 960 samples a frame, 8 x 1024 codes: the released audio tokenizer's geometry."""
    return DacConfig(
        n_codebooks=8,
        codebook_size=1024,
        codebook_dim=8,
        encoder_hidden_size=16,
        decoder_hidden_size=64,
        hidden_size=32,
        downsampling_ratios=[8, 5, 4, 2, 3],
        upsampling_ratios=[3, 2, 4, 5, 8],
        sampling_rate=24000,
    )
