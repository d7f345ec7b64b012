"""The optional judges run with real transformers classes, tiny and random."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForXVector,
)

from ds_higgs.errors import UserError
from ds_higgs.speech.judges import SpeakerJudge, Transcriber

RATE = 24_000
TINY = {
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


def sweep(start: float, stop: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (start + (stop - start) * time / seconds / 2) * time)).astype(np.float32)


@pytest.fixture
def speaker_model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = WavLMConfig(**TINY, tdnn_dim=(8, 8), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1), xvector_output_dim=4)
    WavLMForXVector(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def recogniser(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    letters = ["<pad>", "<unk>", "<s>", "</s>", "|", *"abcdefgh"]
    (tmp_path / "vocab.json").write_text(str({letter: i for i, letter in enumerate(letters)}).replace("'", '"'))
    Wav2Vec2CTCTokenizer(tmp_path / "vocab.json").save_pretrained(tmp_path)
    Wav2Vec2ForCTC(Wav2Vec2Config(**TINY, vocab_size=len(letters))).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.costly
def test_a_voice_is_most_like_itself(speaker_model: Path):
    judge = SpeakerJudge(str(speaker_model))
    low, high = sweep(100, 200), sweep(2000, 4000)
    assert judge.similarity(low, low, sampling_rate=RATE) == pytest.approx(1.0, abs=1e-5)
    assert judge.similarity(low, high, sampling_rate=RATE) < 1 - 1e-5
    assert judge.embed(low, sampling_rate=RATE).norm() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.costly
def test_a_recogniser_writes_its_letters(recogniser: Path):
    transcriber = Transcriber(str(recogniser))
    text = transcriber.transcribe(sweep(100, 4000), sampling_rate=RATE)
    assert set(text) <= set("abcdefgh <>unks/")
    assert text == transcriber.transcribe(sweep(100, 4000), sampling_rate=RATE)


def test_a_model_that_is_not_there_is_the_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="speech recogniser"):
        Transcriber(str(tmp_path)).transcribe(sweep(100, 200), sampling_rate=RATE)
    with pytest.raises(UserError, match="speaker model"):
        SpeakerJudge(str(tmp_path)).embed(sweep(100, 200), sampling_rate=RATE)
