"""Columns drawn for several rows at once: those that boson's own sampler draws for each row, from its own numbers."""

from dataclasses import replace

import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from transformers import GenerationConfig

from ds_higgs.model.batched_sampling import Streams, build_warpers
from ds_higgs.model.generation import GREEDY, VLLM_OMNI, Sampling
from ds_higgs.model.loading import load_model, read_model_config
from ds_higgs.model.server_sampling import codes_as_served

HEARD = (0, 3, 11, 0, 5, 7)  # columns of speech in each row's prompt
COLUMNS = 40
AGAIN = Sampling(top_k=5, ras_max_repeats=1)  # few codes to choose from: many are drawn again
EVERY_SAMPLING = {
    "greedy": GREEDY,
    "boson's": Sampling(),
    "again and again": AGAIN,
    "never again": replace(AGAIN, ras_window=None, top_p=1.0),
    "the server's": replace(VLLM_OMNI, ras_max_repeats=1, top_k=5),
}


@pytest.fixture(scope="module")
def model(tiny_base) -> HiggsAudioModel:
    return load_model(tiny_base, dtype=torch.float32)


class Alone:
    """One row, drawn by boson's sampler."""

    def __init__(self, model: HiggsAudioModel, sampling: Sampling, heard: torch.Tensor, seed: int):
        self.model, self.sampling = model, sampling
        self.columns = torch.cat([heard, heard.new_full((len(heard), 1), model.config.audio_stream_bos_id)], dim=1)
        self.random = torch.Generator().manual_seed(seed)
        self.delay, self.remaining, self.ended = 0, None, False

    def draw(self, logits: torch.Tensor) -> None:
        greedy, end = self.sampling.temperature == 0, self.model.config.audio_eos_token_id
        rules = {
            "ras_win_len": self.sampling.ras_window,
            "ras_win_max_num_repeat": self.sampling.ras_max_repeats,
            "audio_eos_token_id": end,
        }
        tokens, column, _, _, self.delay, self.remaining = self.model._sample_audio_tokens(
            hidden_states=None,
            audio_logits=logits.unsqueeze(0),
            audio_out_ids=self.columns,
            do_sample=not greedy,
            logits_processor=build_warpers(self.sampling) if not greedy else lambda ids, scores: scores,
            device=logits.device,
            torch_generator=self.random,
            generation_config=GenerationConfig(generation_kwargs=rules),
            num_delay=self.delay,
            num_remaining_delays=self.remaining,
        )
        self.columns = torch.cat([self.columns, column.unsqueeze(1)], dim=1)
        self.ended = int(tokens[0]) == end


def make_rows(model: HiggsAudioModel, sampling: Sampling) -> tuple[Streams, list[Alone]]:
    random = torch.Generator().manual_seed(1)
    heard = [torch.randint(0, 1024, (8, columns), generator=random) for columns in HEARD]
    streams = Streams(model.config, sampling, heard, seeds=range(len(heard)), room=COLUMNS)
    return streams, [Alone(model, sampling, codes, seed) for seed, codes in enumerate(heard)]


def draw_both(streams: Streams, rows: list[Alone], *, end_at: float) -> None:
    """The same random logits to both, in which stream EOS is as likely as `end_at` makes it."""
    config, random = rows[0].model.config, torch.Generator().manual_seed(2)
    for _ in range(COLUMNS):
        if streams.all_ended:
            return
        logits = 3 * torch.randn(len(rows), 8, config.audio_codebook_size + 2, generator=random)
        logits[:, :, config.audio_stream_eos_id] = end_at * torch.rand(len(rows), 8, generator=random)
        streams.draw(logits)
        for row, of_row in zip(rows, logits, strict=True):
            if not row.ended:
                row.draw(of_row)


def assert_same(streams: Streams, rows: list[Alone]) -> None:
    for row, heard, spoken in zip(rows, HEARD, streams.spoken(), strict=True):
        assert torch.equal(spoken, row.columns[:, heard:])
    assert streams.ended == [row.ended for row in rows]


def draw_until_ended(model, name: str, *, end_at: float) -> Streams:
    streams, rows = make_rows(model, EVERY_SAMPLING[name])
    with codes_as_served(model) if name == "the server's" else torch.no_grad():
        draw_both(streams, rows, end_at=end_at)
    assert_same(streams, rows)
    return streams


@pytest.mark.parametrize("name", EVERY_SAMPLING)
def test_rows_that_go_on(model, name):
    assert not any(draw_until_ended(model, name, end_at=0.0).ended)


@pytest.mark.parametrize("name", EVERY_SAMPLING)
def test_rows_that_end_in_any_codebook(model, name):
    streams = draw_until_ended(model, name, end_at=12.0)
    assert len({spoken.shape[1] for spoken in streams.spoken()}) > 2
    assert any(streams.ended)


def test_without_a_delay_every_codebook_begins_at_once(tiny_base):
    config = read_model_config(tiny_base)
    config.use_delay_pattern = False
    streams, rows = make_rows(HiggsAudioModel(config), AGAIN)
    draw_both(streams, rows, end_at=12.0)
    assert_same(streams, rows)
    assert not any(streams.ended)
    assert (streams.spoken()[0][:, 1] != config.audio_stream_bos_id).all()


def test_logits_without_a_number_are_an_error(model):
    streams, _ = make_rows(model, Sampling())
    with pytest.raises(RuntimeError, match="not finite"):
        streams.draw(torch.full((len(HEARD), 8, 1026), float("nan")))
