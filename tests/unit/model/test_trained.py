"""Which weights each way of training trains, and that the audio path's leave text alone to the bit."""

from pathlib import Path

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ds_higgs.errors import UserError
from ds_higgs.model.loading import build_meta_model, load_model, released_model_config
from ds_higgs.model.lora import count_parameters
from ds_higgs.model.patches import apply_patches
from ds_higgs.model.tiny import write_tiny_base
from ds_higgs.model.trained import make_trainable, select_weights
from tests.unit.model.conftest import BATCHES, make_inputs


def train_weights(model: HiggsAudioModel, mode: str, only: str | None = None) -> HiggsAudioModel:
    make_trainable(model, mode=mode, only=only, lora={})
    return model


@pytest.fixture
def model(tiny_base: Path) -> HiggsAudioModel:
    return load_model(tiny_base, dtype=torch.float32)


@pytest.mark.parametrize(("mode", "trained"), [("audio_path", 2_164_531_200), ("full", 5_771_283_456)])
def test_of_the_released_model(mode: str, trained: int):
    counts = count_parameters(train_weights(build_meta_model(released_model_config()), mode))
    assert (counts["base"], counts["total"], counts["trainable"]) == (5_771_283_456, 5_771_283_456, trained)
    assert counts["audio_head"] == counts["audio_embeddings"] == 25_214_976
    assert (counts["text_ffn"] == counts["attention"] == counts["text_head"] == 0) == (mode == "audio_path")


@torch.no_grad()
@pytest.mark.parametrize("patched", [False, True])
def test_the_audio_path_moves_no_logit_of_text(model: HiggsAudioModel, patched: bool):
    """And of the other weights each one does, but for the last layer's, which have to be seen somewhere."""
    if patched:
        apply_patches(model, packed_rows=True, kernels="torch", activation_checkpointing=None)
    inputs = [make_inputs(model.config, BATCHES[name]) for name in ("no_audio", "no_audio_one_sample")]

    def logits() -> list[torch.Tensor]:
        outputs = [model(**one, use_cache=False) for one in inputs]
        return [one.logits[one.attention_mask.bool()] for one in outputs]

    before = logits()
    audio_path = set(select_weights(model, mode="audio_path"))
    weights = dict(model.named_parameters())
    for name in audio_path:
        weights[name].add_(torch.randn_like(weights[name]))
    assert all(torch.equal(now, then) for now, then in zip(logits(), before, strict=True))
    for name in weights.keys() - audio_path:
        kept = weights[name].clone()
        weights[name].add_(torch.randn_like(kept))
        assert not any(torch.equal(now, then) for now, then in zip(logits(), before, strict=True)), name
        weights[name].copy_(kept)


@torch.no_grad()
def test_the_audio_path_is_all_that_audio_alone_passes_through(model: HiggsAudioModel):
    inputs = make_inputs(model.config, BATCHES["several_segments"])
    before = model(**inputs, use_cache=False).audio_logits
    weights = dict(model.named_parameters())
    for name in select_weights(model, mode="audio_path"):
        kept = weights[name].clone()
        weights[name].add_(torch.randn_like(kept))
        assert not torch.equal(model(**inputs, use_cache=False).audio_logits, before), name
        weights[name].copy_(kept)


def test_full_leaves_out_what_the_base_never_uses(tmp_path: Path):
    write_tiny_base(tmp_path / "base", whisper=True)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    whisper = {name for name, _ in model.named_parameters() if name.startswith(("audio_tower.", "audio_encoder_proj."))}
    positions = "audio_tower.embed_positions.weight"
    assert set(select_weights(model, mode="full")) & whisper == whisper - {positions}
    model.config.encode_whisper_embed = False
    assert not set(select_weights(model, mode="full")) & whisper


def test_an_expression_takes_some_of_the_modes_weights(model: HiggsAudioModel):
    train_weights(model, "full", r"layers\.[01]\.audio_mlp\..*|norm\.weight")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    projections = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    assert trained == {f"layers.{n}.audio_mlp.{name}" for n in (0, 1) for name in projections} | {"norm.weight"}


@pytest.mark.parametrize(("mode", "only"), [("full", "audio_mlp"), ("audio_path", r"layers\.0\.mlp\..*")])
def test_an_expression_that_takes_nothing_is_refused(model: HiggsAudioModel, mode: str, only: str):
    with pytest.raises(UserError, match=f"train.only: no whole name of a weight that {mode} trains matches"):
        train_weights(model, mode, only)


def test_a_base_without_audio_path_is_refused(model: HiggsAudioModel):
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"train.mode: audio_path: this base has no such weights"):
        train_weights(model, "audio_path")
