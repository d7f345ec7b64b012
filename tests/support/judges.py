"""Small judges with random weights, of transformers' real classes: they show the plumbing, and hear nothing."""

import json
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForXVector,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 5),
    "conv_stride": (160, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_LANGUAGES = ("en", "ar")
_MOST_WORDS = 12


def write_speaker_model(folder: Path) -> Path:
    """An x-vector model that looks as far around as the released ones do."""
    torch.manual_seed(0)
    shape = {"tdnn_dim": (8,) * 5, "tdnn_kernel": (5, 3, 3, 1, 1), "tdnn_dilation": (1, 2, 3, 1, 1)}
    WavLMForXVector(WavLMConfig(**_ENCODER, **shape, xvector_output_dim=4)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    return folder


def write_letter_recogniser(folder: Path) -> Path:
    """A recogniser of letters by CTC, which takes no language."""
    torch.manual_seed(0)
    letters = ["<pad>", "<unk>", "<s>", "</s>", "|", *"abcdefgh"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
    Wav2Vec2ForCTC(Wav2Vec2Config(**_ENCODER, vocab_size=len(letters))).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    return folder


def write_whisper(folder: Path) -> Path:
    """A multilingual Whisper of bytes, which knows English and Arabic and says at most _MOST_WORDS tokens."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _write_whisper_tokenizer(folder)
    numbers = tokenizer.convert_tokens_to_ids
    end = numbers("<|endoftext|>")
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
        **{"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "max_target_positions": 64},
        decoder_start_token_id=numbers("<|startoftranscript|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        **{"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "max_length": _MOST_WORDS},
        decoder_start_token_id=numbers("<|startoftranscript|>"),
        no_timestamps_token_id=numbers("<|notimestamps|>"),
        prev_sot_token_id=numbers("<|startofprev|>"),
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": numbers(f"<|{code}|>") for code in _LANGUAGES},
        task_to_id={task: numbers(f"<|{task}|>") for task in ("transcribe", "translate")},
        suppress_tokens=[number for number in tokenizer.all_special_ids if number != end],
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def _write_whisper_tokenizer(folder: Path) -> WhisperTokenizer:
    letters = [*bytes_to_unicode().values(), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = ["<|startoftranscript|>", *(f"<|{code}|>" for code in _LANGUAGES), "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer = WhisperTokenizer(folder / "vocab.json", folder / "merges.txt", additional_special_tokens=special)
    tokenizer.add_tokens([f"<|{0.02 * place:.2f}|>" for place in range(1501)])
    tokenizer.save_pretrained(folder)
    return tokenizer
