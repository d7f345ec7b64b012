"""Generation by boson's own loop: seeds, both kinds of stop, and how its streams are read."""

from pathlib import Path

import pytest
import torch

from ds_higgs.batch import ModelInputs
from ds_higgs.model.generation import GREEDY, Sampling, generate_codes, max_frames_for, read_stream
from ds_higgs.model.loading import HiggsAudioModel, load_model, read_model_config
from tests.support.prompts import make_prompt

MAX_FRAMES = 20
EOS = 1025
SERVED = Sampling()


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> HiggsAudioModel:
    return load_model(tiny_base, dtype=torch.float32)


@pytest.fixture
def prompt(model: HiggsAudioModel) -> ModelInputs:
    return make_prompt(model.config, [40, 65])


def speak(model: HiggsAudioModel, prompt: ModelInputs, *, sampling: Sampling = SERVED, seed: int = 0):
    return generate_codes(model, prompt, max_frames=MAX_FRAMES, sampling=sampling, seed=seed)


def test_the_same_seed_gives_the_same_codes(model: HiggsAudioModel, prompt: ModelInputs):
    first, again, other = (speak(model, prompt, seed=seed).codes for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_repetition_aware_sampling_follows_the_seed_too(model: HiggsAudioModel, prompt: ModelInputs):
    repeating = Sampling(temperature=1e-3, ras_window=7, ras_max_repeats=1)
    assert torch.equal(*(speak(model, prompt, sampling=repeating, seed=3).codes for _ in range(2)))
    without = speak(model, prompt, sampling=Sampling(temperature=1e-3, ras_window=None), seed=3).codes
    assert not torch.equal(without, speak(model, prompt, sampling=repeating, seed=3).codes)


def test_greedy_takes_no_notice_of_the_seed(model: HiggsAudioModel, prompt: ModelInputs):
    assert torch.equal(*(speak(model, prompt, sampling=GREEDY, seed=seed).codes for seed in (1, 2)))


def test_training_goes_on_as_if_nothing_had_been_said(model: HiggsAudioModel, prompt: ModelInputs):
    model.train()
    model.norm.eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    speak(model, prompt)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not model.norm.training
    model.norm.train()


def test_the_limit_stops_and_says_so(model: HiggsAudioModel, prompt: ModelInputs, monkeypatch: pytest.MonkeyPatch):
    _force_codes(model, monkeypatch, num_frames=10 * MAX_FRAMES)
    spoken = speak(model, prompt, sampling=GREEDY)
    assert spoken.stopped_by == "length"
    assert spoken.codes.shape == (8, MAX_FRAMES)


@pytest.mark.parametrize("num_frames", [1, 5, MAX_FRAMES])
def test_eos_stops_and_says_so(model, prompt, monkeypatch, num_frames: int):
    _force_codes(model, monkeypatch, num_frames=num_frames)
    spoken = speak(model, prompt, sampling=GREEDY)
    assert spoken.stopped_by == "eos"
    codebooks, frames = torch.arange(8).unsqueeze(1), torch.arange(num_frames)
    assert torch.equal(spoken.codes, 100 * codebooks + frames)


def _force_codes(model: HiggsAudioModel, monkeypatch: pytest.MonkeyPatch, *, num_frames: int) -> None:
    """Make the likeliest codes those of a delayed stream: 100 c + f for frame f of codebook c, then stream EOS."""
    columns = iter(range(1, 1000))
    original = model.audio_decoder_proj.forward

    def forced(*args, **kwargs):
        outputs = list(original(*args, **kwargs))
        if outputs[1].shape[0]:
            column = next(columns)
            logits = torch.zeros_like(outputs[1]).view(-1, 8, EOS + 1)
            for codebook in range(8):
                frame = column - 1 - codebook
                code = EOS if frame >= num_frames else max(100 * codebook + frame, 0)
                logits[-1, codebook, code] = 1.0
            outputs[1] = logits.flatten(1)
        return tuple(outputs)

    monkeypatch.setattr(model.audio_decoder_proj, "forward", forced)


def delayed(frames: torch.Tensor) -> torch.Tensor:
    """[codebooks, n] -> the stream that boson generates for it, stream BOS and EOS included."""
    codebooks, num_frames = frames.shape
    stream = torch.full((codebooks, num_frames + 2 + codebooks - 1), EOS)
    for codebook in range(codebooks):
        stream[codebook, : codebook + 1] = 1024
        stream[codebook, codebook + 1 : codebook + 1 + num_frames] = frames[codebook]
    return stream


def test_a_stream_is_read_up_to_its_first_eos(tiny_base: Path):
    config = read_model_config(tiny_base)
    frames = torch.arange(8 * 6).view(8, 6)
    assert torch.equal(read_stream(delayed(frames), config), frames)
    unfinished = delayed(frames)[:, :10]
    assert torch.equal(read_stream(unfinished, config), frames[:, :2])
    early = frames.clone()
    early[5, 3] = EOS
    assert torch.equal(read_stream(delayed(early), config), frames[:, :3])
    assert read_stream(delayed(frames)[:, :4], config).shape == (8, 0)


def test_without_a_delay_pattern(tiny_base: Path):
    config = read_model_config(tiny_base)
    config.use_delay_pattern = False
    frames = torch.arange(8 * 6).view(8, 6)
    ends = torch.full((8, 1), 1024), torch.full((8, 1), EOS)
    assert torch.equal(read_stream(torch.cat([ends[0], frames, ends[1]], dim=1), config), frames)


def test_frames_of_a_duration():
    assert max_frames_for(2.0, sampling_rate=24_000, hop_length=960) == 50
    assert max_frames_for(2.01, sampling_rate=24_000, hop_length=960) == 51
    assert max_frames_for(0.0, sampling_rate=24_000, hop_length=960) == 1
