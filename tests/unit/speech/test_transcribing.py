"""`ds-higgs manifest --transcribe`: the real pipeline with a tiny random Whisper, and what is kept of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from ds_higgs.cli.main import run
from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.errors import UserError
from ds_higgs.speech.transcribing import check_texts, transcribe_missing

RATE = 16_000


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    """A Whisper that hears the letter a in everything: only the weight of that token's embedding is not random."""
    folder = tmp_path_factory.mktemp("whisper")
    symbols = list(bytes_to_unicode().values())
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    (folder / "vocab.json").write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(folder / "vocab.json", folder / "merges.txt")
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|endoftext|>"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = WhisperConfig(
            **{"vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
            **{
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16,
            },
            **{"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end},
            **{"suppress_tokens": None, "begin_suppress_tokens": None, "max_target_positions": 32},
        )
        model = WhisperForConditionalGeneration(config)
        model.model.decoder.layer_norm.weight.data.zero_()
        model.model.decoder.layer_norm.bias.data.fill_(1.0)
        model.model.decoder.embed_tokens.weight.data[tokenizer.convert_tokens_to_ids("a")] = 1.0
    model.generation_config.max_length = 6
    model.save_pretrained(folder)
    return folder


def write_recordings(folder: Path, *, seconds: float = 0.5) -> Path:
    folder.mkdir()
    for number in range(3):
        time = np.arange(round(seconds * RATE)) / RATE
        soundfile.write(folder / f"r{number}.wav", 0.3 * np.sin(2 * np.pi * (200 + 100 * number) * time), RATE)
    (folder / "r1.txt").write_text("Known.")
    return folder


@pytest.mark.costly
def test_recordings_without_a_text_are_transcribed_once(tmp_path, whisper, monkeypatch):
    source, out = write_recordings(tmp_path / "in"), tmp_path / "train.json"
    with pytest.raises(UserError, match=r"(?s)2 recordings have no text; .*--transcribe MODEL:.*r0\.wav.*r2\.wav"):
        run(["manifest", str(source), "-o", str(out)])
    run(["manifest", str(source), "-o", str(out), "--transcribe", str(whisper)])
    texts = [sample["messages"][2]["content"][0]["text"] for sample in json.loads(out.read_text())]
    assert texts[1] == "Known."
    assert texts[0] == texts[2]
    assert set(texts[0]) == {"a"}
    lines = (tmp_path / "train_audio" / "transcripts.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["r0.wav", "r2.wav"]

    monkeypatch.setattr("ds_higgs.speech.judges.Transcriber.transcribe", None)  # nothing is heard again
    run(["manifest", str(source), "-o", str(out), "--transcribe", str(whisper)])
    assert len((tmp_path / "train_audio" / "transcripts.jsonl").read_text().splitlines()) == 2


class Deaf:
    """A recogniser that hears nothing."""

    model, language = "deaf", None

    def transcribe(self, waveform: np.ndarray, *, sampling_rate: int) -> str:
        assert sampling_rate == RATE
        return " "


def test_what_cannot_be_transcribed_is_named(tmp_path):
    folder = write_recordings(tmp_path / "in", seconds=31)
    soundfile.write(folder / "r2.wav", np.zeros(RATE) + 0.1 * np.sin(np.arange(RATE)), RATE)
    utterances = [Utterance(folder / f"r{number}.wav", "", "a", f"r{number}.wav") for number in range(3)]
    with pytest.raises(UserError, match=r"(?s)3 rec.*r0\.wav: 31\.0 s of audio; .*cut it.*r2\.wav: nothing was heard"):
        transcribe_missing(utterances, Deaf(), record=tmp_path / "transcripts.jsonl")
    check_texts(folder, [Utterance(folder / "r0.wav", "", "a", "r0.wav", messages=({"role": "user", "content": []},))])


def test_a_language_needs_a_recogniser(tmp_path):
    with pytest.raises(UserError, match="--language: needs --transcribe"):
        run(["manifest", str(tmp_path), "-o", str(tmp_path / "a.json"), "--language", "arabic"])
