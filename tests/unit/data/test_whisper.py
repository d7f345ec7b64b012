"""Reference audio as Whisper features: through the real audio tower, against what the model expands."""

import json

import pytest
import torch

from ds_higgs.data.audio import Segment, decode
from ds_higgs.data.build import build_dataset
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.whisper import build_whisper_processor
from ds_higgs.errors import UserError
from ds_higgs.model.loading import load_model, read_model_config
from ds_higgs.model.tiny import write_tiny_base

from .audio_files import cloning_sample, write_tone


@pytest.fixture(scope="module")
def whisper_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper") / "base"
    write_tiny_base(folder, whisper=True)
    return folder


@pytest.fixture(scope="module")
def whisper_rules(whisper_base, make_rules):
    return make_rules(model_config=read_model_config(whisper_base))


@pytest.fixture(scope="module")
def dataset(mixed_manifest, whisper_rules, tmp_path_factory):
    """Without the last sample, whose user audio comes after assistant audio."""
    cache_dir = tmp_path_factory.mktemp("cache")
    return build_dataset(mixed_manifest, rules=whisper_rules, cache_dir=cache_dir, on_bad_sample="skip")


@pytest.fixture(scope="module")
def whisper_model(whisper_base):
    return load_model(whisper_base, dtype=torch.float32)


def test_the_base_checkpoints_config_turns_it_on(whisper_rules, make_rules):
    assert whisper_rules.layout.whisper
    assert not make_rules().layout.whisper


def test_lengths_are_the_models_expanded_lengths(dataset, whisper_rules, whisper_model, mixed_dataset):
    batch = BatchCollator(whisper_rules.layout)([dataset[index] for index in range(len(dataset))], [""] * len(dataset))
    with torch.no_grad():
        expanded = whisper_model(**batch.model_inputs).attention_mask
    assert expanded.sum(1).tolist() == dataset.lengths.tolist()
    assert batch.num_tokens == int(expanded.sum())
    assert (dataset.lengths[:7] > mixed_dataset.lengths[:7]).all()


def test_features_are_those_of_the_reference_audio(dataset, whisper_rules, mixed_manifest):
    batch = BatchCollator(whisper_rules.layout)([dataset[0], dataset[1]], ["", ""])
    extractor = build_whisper_processor(128).feature_extractor
    assert batch.model_inputs["audio_features"].shape == (2, 128, 3000)
    for index in range(2):
        path = mixed_manifest.parent / f"reference{index}.wav"
        waveform = decode(path, Segment(), sampling_rate=16000)
        expected = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features[0]
        torch.testing.assert_close(batch.model_inputs["audio_features"][index], expected)


def test_a_batch_without_reference_audio_has_no_features(dataset, whisper_rules, whisper_model):
    text_only = len(dataset) - 1
    batch = BatchCollator(whisper_rules.layout)([dataset[text_only]], [""])
    assert batch.model_inputs["audio_features"].shape == (0, 128, 3000)
    with torch.no_grad():
        assert int(whisper_model(**batch.model_inputs).attention_mask.sum()) == batch.num_tokens


def test_the_audio_tower_hears_the_reference(dataset, whisper_rules, whisper_model):
    """Its output reaches the audio logits, from workers too."""
    loader = StepLoader(EpochOrder(dataset, batch_size=2), BatchCollator(whisper_rules.layout), num_workers=1)
    batch = next(step[0] for step in loader if len(step[0].model_inputs["audio_features"]))
    inputs = dict(batch.model_inputs)
    with torch.no_grad():
        heard = whisper_model(**inputs).audio_logits
        other = whisper_model(**{**inputs, "audio_features": inputs["audio_features"] * 0}).audio_logits
    assert not torch.allclose(heard, other)


def test_asking_for_it_without_an_audio_tower_is_an_error(make_rules):
    with pytest.raises(UserError, match=r"data.encode_whisper_embed: the base checkpoint has no audio tower"):
        make_rules(encode_whisper_embed=True)


def test_it_can_be_turned_off(whisper_base, make_rules):
    rules = make_rules(model_config=read_model_config(whisper_base), encode_whisper_embed=False)
    assert not rules.layout.whisper


def test_what_bosons_collator_gets_wrong_is_refused(tmp_path, whisper_rules):
    write_tone(tmp_path / "long.wav", 31.0)
    write_tone(tmp_path / "short.wav", 0.5)
    late = cloning_sample("short.wav", "short.wav")
    late["messages"] = late["messages"][1:] * 2
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps([cloning_sample("long.wav", "short.wav"), late]))
    with pytest.raises(UserError) as caught:
        build_dataset(manifest, rules=whisper_rules, cache_dir=tmp_path / "cache")
    found = f"train.json:0: reference audio {tmp_path}/long.wav: 31.0 s of audio (expected at most 30 s"
    assert found in str(caught.value)
    assert "train.json:1: user audio after assistant audio" in str(caught.value)


def test_a_folders_own_extractor_is_taken_and_checked(tmp_path):
    build_whisper_processor(128).feature_extractor.save_pretrained(tmp_path)
    assert build_whisper_processor(128, tmp_path).feature_extractor.feature_size == 128
    with pytest.raises(UserError, match=r"preprocessor_config.json: .*is \(128, .*expects \(80, "):
        build_whisper_processor(80, tmp_path)
