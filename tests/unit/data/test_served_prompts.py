"""Our prompt in the form boson is the one that boson's own serve engine makes: token by token, code by code."""

import sys
import types
from pathlib import Path

import librosa
import pytest
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message

from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.prompt_forms import SERVED_SYSTEM_MESSAGE
from ds_higgs.data.prompts import build_voice_prompt, collate_prompt
from tests.support.conversations import CONVERSATIONS

from .audio_files import RATE, write_tone


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return write_tone(tmp_path_factory.mktemp("reference") / "reference.wav", 0.5)


@pytest.fixture(scope="module")
def codec(codec_source):
    return codec_source.load("cpu")


@pytest.fixture
def engine(make_rules, codec, model_config, monkeypatch):
    """boson's engine as far as it prepares inputs: its tokenizer, its collator with its settings, a codec."""
    module = types.ModuleType("higgs_audio_tokenizer")
    module.load_higgs_audio_tokenizer = None  # what it would download with
    monkeypatch.setitem(sys.modules, "boson_multimodal.audio_processing.higgs_audio_tokenizer", module)
    from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine

    made = HiggsAudioServeEngine.__new__(HiggsAudioServeEngine)
    made.device = "cpu"
    made.tokenizer = make_rules().tokenizer
    made.model = types.SimpleNamespace(device=torch.device("cpu"))
    made.audio_tokenizer = types.SimpleNamespace(
        sampling_rate=RATE, encode=lambda waveform, _: codec.encode([waveform])[0].unsqueeze(0)
    )
    made.collator = HiggsAudioSampleCollator(
        whisper_processor=None,
        encode_whisper_embed=model_config.encode_whisper_embed,
        audio_in_token_id=model_config.audio_in_token_idx,
        audio_out_token_id=model_config.audio_out_token_idx,
        audio_stream_bos_id=model_config.audio_stream_bos_id,
        audio_stream_eos_id=model_config.audio_stream_eos_id,
        pad_token_id=model_config.pad_token_id,
        return_audio_in_tokens=False,
        use_delay_pattern=model_config.use_delay_pattern,
        audio_num_codebooks=model_config.audio_num_codebooks,
        round_to=1,
    )
    return made


@pytest.mark.parametrize(("text", "reference_text", "system"), CONVERSATIONS)
def test_the_prompt_is_that_of_bosons_engine(text, reference_text, system, engine, codec, reference, make_rules):
    rules = make_rules()
    heard = []
    if reference_text is not None:
        audio = Message("assistant", AudioContent(audio_url=str(reference)))
        heard = [Message("user", reference_text.strip()), audio]
    messages = [Message("system", system or SERVED_SYSTEM_MESSAGE), *heard, Message("user", text.strip())]
    theirs = engine._prepare_inputs(ChatMLSample(messages), force_audio_gen=True)
    waveform, _ = librosa.load(reference, sr=RATE)
    prompt = build_voice_prompt(
        text,
        reference_text=reference_text,
        reference_codes=None if reference_text is None else codec.encode([waveform])[0],
        form="boson",
        system=system,
        tokenizer=rules.tokenizer,
        layout=rules.layout,
    )
    ours = collate_prompt(prompt, BatchCollator(rules.layout))
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert ours["attention_mask"].tolist() == theirs["attention_mask"].tolist()
    if reference_text is None:
        assert ours["audio_out_ids"].numel() == 0
        assert theirs["audio_out_ids"] is None or theirs["audio_out_ids"].numel() == 0
    else:
        assert torch.equal(ours["audio_out_ids"], theirs["audio_out_ids"])
        assert torch.equal(ours["audio_out_ids_start"], theirs["audio_out_ids_start"])
