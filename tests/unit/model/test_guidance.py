"""Guided speech: at every frame the logits of two whole forwards, put together."""

from pathlib import Path

import pytest
import torch

from ds_higgs.batch import ModelInputs
from ds_higgs.model.generation import GREEDY, Sampling, generate_codes
from ds_higgs.model.guidance import Guidance
from ds_higgs.model.loading import HiggsAudioModel, load_model
from tests.support.prompts import make_prompt

FRAMES = 12


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> HiggsAudioModel:
    return load_model(tiny_base, dtype=torch.float32).eval()


def speak(model, prompt, guidance=None, *, sampling=GREEDY):
    return generate_codes(model, prompt, max_frames=FRAMES, sampling=sampling, seed=4, guidance=guidance).codes


@torch.no_grad()
def last_logits(model: HiggsAudioModel, prompt: ModelInputs, stream: torch.Tensor) -> torch.Tensor:
    """[codebooks, codes] after a prompt and the speech so far, in one forward without a cache."""
    speech = torch.tensor([[model.config.audio_out_token_idx]])
    out_frames = prompt["audio_out_ids"].shape[1]
    return model(
        input_ids=torch.cat([prompt["input_ids"], speech], dim=1),
        attention_mask=torch.ones(1, prompt["input_ids"].shape[1] + 1, dtype=torch.long),
        audio_in_ids=prompt["audio_in_ids"],
        audio_in_ids_start=prompt["audio_in_ids_start"],
        audio_out_ids=torch.cat([prompt["audio_out_ids"], stream], dim=1),
        audio_out_ids_start=torch.cat([prompt["audio_out_ids_start"], torch.tensor([out_frames])]),
        use_cache=False,
    ).audio_logits[-1]


@pytest.mark.parametrize("references", [{"in_frames": 9}, {"out_frames": 7}, {"in_frames": 5, "out_frames": 6}])
def test_logits_are_those_of_two_whole_forwards(model, monkeypatch, references):
    """What the sampler is given at each frame, against plain forwards of both prompts."""
    whole, without = make_prompt(model.config, [40, 65], **references), make_prompt(model.config, [40, 65])
    given, original = [], model._sample_audio_tokens

    def spy(**arguments):
        given.append((arguments["audio_out_ids"].clone(), arguments["audio_logits"][-1].clone()))
        return original(**arguments)

    monkeypatch.setattr(model, "_sample_audio_tokens", spy)
    speak(model, whole, Guidance(without, 2.5))
    assert len(given) > FRAMES
    for audio, logits in given:
        stream = audio[:, whole["audio_out_ids"].shape[1] :]
        plain, guide = last_logits(model, whole, stream), last_logits(model, without, stream)
        assert (plain - guide).abs().max() > 1e-3, "the reference makes no difference"
        torch.testing.assert_close(logits, guide + 2.5 * (plain - guide), rtol=1e-4, atol=1e-4)


def test_a_scale_of_one_and_equal_prompts_change_nothing(model):
    whole, without = make_prompt(model.config, [40, 65], in_frames=9), make_prompt(model.config, [40, 65])
    expected = speak(model, whole)
    assert torch.equal(speak(model, whole, Guidance(without, 1.0)), expected)
    assert torch.equal(speak(model, whole, Guidance(whole, 7.0)), expected)
    assert torch.equal(speak(model, whole, Guidance(without, 0.0)), speak(model, without))
    far = Guidance(without, 30.0)
    assert not torch.equal(speak(model, whole, far), expected)


def test_the_model_is_left_as_it_was(model):
    prompt = make_prompt(model.config, [40, 65])
    speak(model, prompt, Guidance(prompt, 2.0), sampling=Sampling())
    assert "forward" not in vars(model)
