"""Several prompts spoken at once: each as boson's own generate speaks it alone, whatever stands beside it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ds_higgs.batch import ModelInputs
from ds_higgs.model.batched_generation import generate_together, join_prompts
from ds_higgs.model.generation import GREEDY, VLLM_OMNI, Sampling, generate_codes
from ds_higgs.model.loading import load_model, read_model_config
from ds_higgs.model.lora import apply_lora, unwrap
from ds_higgs.model.patches import apply_patches
from ds_higgs.model.tiny import write_tiny_base
from tests.support.prompts import make_prompt

FRAMES = 30
WHISPER_FRAMES = 3000  # 30 s, whatever is heard of them
# Text tokens, frames of a reference in the request, and of one in an assistant turn.
SHAPES = ((9, 0, 0), (3, 11, 0), (21, 0, 6), (5, 4, 9), (2, 0, 0), (14, 7, 0))
EVERY_SAMPLING = {"greedy": GREEDY, "boson's": Sampling(ras_max_repeats=1), "the server's": VLLM_OMNI}


def random_prompt(config, shape: tuple[int, int, int], *, whisper: bool = False) -> ModelInputs:
    """A prompt of random tokens and codes, its request's reference as Whisper features too."""
    text, in_frames, out_frames = shape
    random = torch.Generator().manual_seed(sum(shape))
    words = torch.randint(30, 90, (text,), generator=random).tolist()
    features = {}
    if whisper:
        clips, mel_bins = int(in_frames > 0), config.audio_encoder_config.num_mel_bins
        features["audio_features"] = torch.randn(clips, mel_bins, WHISPER_FRAMES, generator=random)
        heard = (torch.arange(WHISPER_FRAMES) < 20 * in_frames).int()
        features["audio_feature_attention_mask"] = heard.expand(clips, -1)
    return make_prompt(config, words, in_frames=in_frames, out_frames=out_frames, random=random, **features)


def adapted(model: HiggsAudioModel) -> HiggsAudioModel:
    """With LoRA that changes what is said, and patched as training patches it."""
    targets = ("attention", "text_ffn", "audio_ffn")
    peft_model = apply_lora(model, rank=4, alpha=8, dropout=0.1, targets=targets, modules_to_save=["audio_head"])
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    apply_patches(unwrap(peft_model), packed_rows=True, kernels="torch", activation_checkpointing=None)
    return unwrap(peft_model).train()


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> HiggsAudioModel:
    return adapted(load_model(tiny_base, dtype=torch.float32))


def speak_both_ways(model: HiggsAudioModel, prompts: Sequence[ModelInputs], sampling: Sampling, frames: int = FRAMES):
    """What is said at once, and one by one."""
    seeds = range(5, 5 + len(prompts))
    together = generate_together(model, prompts, max_frames=frames, sampling=sampling, seeds=seeds)
    alone = [
        generate_codes(model, prompt, max_frames=frames, sampling=sampling, seed=seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return together, alone


def assert_equal(together, alone) -> None:
    for one, other in zip(together, alone, strict=True):
        assert one.stopped_by == other.stopped_by
        assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("name", EVERY_SAMPLING)
def test_each_is_spoken_as_alone(model, name):
    prompts = [random_prompt(model.config, shape) for shape in SHAPES]
    together, alone = speak_both_ways(model, prompts, EVERY_SAMPLING[name])
    assert_equal(together, alone)
    assert len({tuple(one.codes.flatten().tolist()) for one in together}) == len(prompts)


def test_rows_end_by_themselves_at_their_own_time(model):
    """With a liking for the end in the first codebook, by which some end early, some late, and some not at all."""
    head = model.audio_decoder_proj.audio_lm_head
    favour = torch.zeros(head.weight.shape[0])
    favour[model.config.audio_stream_eos_id] = 0.3
    handle = head.register_forward_hook(lambda module, inputs, output: output + favour)
    prompts = [random_prompt(model.config, shape) for shape in SHAPES]
    together, alone = speak_both_ways(model, prompts, GREEDY)
    handle.remove()
    assert_equal(together, alone)
    assert {one.stopped_by for one in together} == {"eos", "length"}
    assert len({one.codes.shape[1] for one in together}) > 2


def test_one_prompt_and_prompts_of_one_length(model):
    for shapes in (SHAPES[:1], [(6, 0, 0), (4, 0, 0)], [(4, 3, 0)] * 2):
        assert_equal(*speak_both_ways(model, [random_prompt(model.config, shape) for shape in shapes], GREEDY))


def test_layers_that_audio_passes_by(tiny_base: Path):
    config = read_model_config(tiny_base)
    config.audio_dual_ffn_layers = [0, 2]
    model = HiggsAudioModel(config)
    prompts = [random_prompt(config, shape) for shape in SHAPES[:4]]
    assert_equal(*speak_both_ways(model, prompts, GREEDY, frames=8))


def test_references_that_whisper_hears(tmp_path: Path):
    write_tiny_base(tmp_path / "base", whisper=True)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    prompts = [random_prompt(model.config, shape, whisper=True) for shape in SHAPES]
    assert_equal(*speak_both_ways(model, prompts, GREEDY, frames=8))


def test_a_batch_is_padded_on_the_left_and_keeps_its_segments_apart(tiny_base: Path):
    config = read_model_config(tiny_base)
    prompts = [random_prompt(config, shape) for shape in SHAPES[:4]]
    joined = join_prompts(prompts, pad_id=config.pad_token_id)
    assert joined["input_ids"].shape == (4, 24)
    for row, prompt in enumerate(prompts):
        length = prompt["input_ids"].shape[1]
        assert torch.equal(joined["input_ids"][row, 24 - length :], prompt["input_ids"][0])
        assert joined["attention_mask"][row].tolist() == [0] * (24 - length) + [1] * length
    assert joined["audio_in_ids_start"].tolist() == [0, 11]
    assert joined["audio_out_ids_start"].tolist() == [0, 6]
    assert joined["audio_out_ids"].shape == (8, 15)


def test_a_stop_leaves_the_rest(model):
    answers = iter([False, False, True])
    prompts = [random_prompt(model.config, shape) for shape in SHAPES[:2]]
    settings = {"max_frames": FRAMES, "sampling": GREEDY, "seeds": (0, 0)}
    generate_together(model, prompts, **settings, stop=lambda: next(answers))
    assert list(answers) == []


def test_with_flash_attention_prompts_are_spoken_one_by_one(model, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    prompts = [random_prompt(model.config, shape) for shape in SHAPES[:3]]
    settings = {"max_frames": 3, "sampling": GREEDY}
    answers = iter([False, False, True])
    spoken = generate_together(model, prompts, seeds=range(3), stop=lambda: next(answers), **settings)
    assert_equal(spoken[:2], [generate_codes(model, prompt, seed=0, **settings) for prompt in prompts[:2]])
    assert spoken[2].codes.shape == (8, 0)


def test_training_goes_on_as_if_nothing_had_been_said(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate_together(model, [random_prompt(model.config, SHAPES[0])], max_frames=3, sampling=Sampling(), seeds=[0])
    assert torch.equal(torch.rand(3), expected)
    assert model.training
