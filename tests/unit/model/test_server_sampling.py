"""vLLM-Omni's rules, column by column, and a model that would end in another codebook than the first."""

import pytest
import torch

from ds_higgs.errors import UserError
from ds_higgs.model.generation import GREEDY, VLLM_OMNI, generate_codes
from ds_higgs.model.loading import load_model
from ds_higgs.model.server_sampling import NOT_ENDING, allowed_codes, codes_as_served
from tests.support.prompts import make_prompt

BOS, EOS = 5, 6


def may_draw(delay, remaining):
    """For each of four codebooks: what stands for codes, BOS, EOS."""
    rows = torch.tensor([NOT_ENDING, NOT_ENDING if remaining is None else remaining])
    allowed = allowed_codes(torch.arange(4), 7, delay, rows, bos=BOS, eos=EOS)[1]
    return ["".join(name for name, at in zip("cBE", (0, BOS, EOS), strict=True) if row[at]) for row in allowed]


@pytest.mark.parametrize(
    ("delay", "remaining", "expected"),
    [
        (0, None, ["cE", "B", "B", "B"]),
        (1, None, ["cE", "c", "B", "B"]),
        (3, None, ["cE", "c", "c", "c"]),
        (3, 3, ["E", "c", "c", "c"]),
        (3, 2, ["E", "E", "c", "c"]),
        (3, 1, ["E", "E", "E", "c"]),
    ],
)
def test_what_may_be_drawn(delay, remaining, expected):
    assert may_draw(delay, remaining) == expected


def test_an_end_in_another_codebook_does_not_end_the_speech(tiny_base):
    model = load_model(tiny_base, dtype=torch.float32)
    prompt = make_prompt(model.config, [40, 65])
    eager_to_end(model, codebook=3)
    assert generate_codes(model, prompt, max_frames=12, sampling=GREEDY, seed=0).stopped_by == "eos"
    served = generate_codes(model, prompt, max_frames=12, sampling=VLLM_OMNI, seed=0)
    assert (served.stopped_by, served.codes.shape) == ("length", (8, 12))
    eager_to_end(model, codebook=0)
    assert generate_codes(model, prompt, max_frames=12, sampling=VLLM_OMNI, seed=0).stopped_by == "eos"
    assert "_sample_audio_tokens" not in vars(model)


def eager_to_end(model, *, codebook: int) -> None:
    """Make stream EOS by far the likeliest code of one codebook, whatever the hidden state."""
    config = model.config
    weight = model.audio_decoder_proj.audio_lm_head.weight
    row = codebook * (config.audio_codebook_size + 2) + config.audio_stream_eos_id

    def favour_the_end(module, inputs, output):
        return output.index_add(-1, torch.tensor([row]), torch.full((*output.shape[:-1], 1), 1e3))

    assert weight.shape[0] == config.audio_num_codebooks * (config.audio_codebook_size + 2)
    model.audio_decoder_proj.audio_lm_head.register_forward_hook(favour_the_end)


def test_a_model_without_delay_is_refused(tiny_base):
    model = load_model(tiny_base, dtype=torch.float32)
    model.config.use_delay_pattern = False
    with pytest.raises(UserError, match="no delay pattern"), codes_as_served(model):
        pass
