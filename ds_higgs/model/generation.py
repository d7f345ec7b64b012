"""Speech codes by boson_multimodal's own `generate`, told apart by what ended them: EOS or the length limit."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from boson_multimodal.model.higgs_audio.utils import revert_delay_pattern

from ds_higgs.batch import ModelInputs
from ds_higgs.model.guidance import Guidance, guided
from ds_higgs.model.server_sampling import codes_as_served


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn; the defaults are those of boson's serve engine.

    temperature: 0 takes the likeliest code, always (greedy), whatever the rest says.
    top_k: None for no limit.
    ras_window: repetition-aware sampling: a code seen `ras_max_repeats` times in a codebook's last `ras_window` frames
        is drawn again without temperature or limits; None switches it off.
    as_served: only codes that vLLM-Omni allows; see `server_sampling`.
    """

    temperature: float = 0.7
    top_k: int | None = None
    top_p: float = 0.95
    ras_window: int | None = 7
    ras_max_repeats: int = 2
    as_served: bool = False


GREEDY = Sampling(temperature=0.0, ras_window=None)
# What vLLM-Omni does, whatever a request says.
VLLM_OMNI = Sampling(temperature=1.0, top_k=50, as_served=True)


@dataclass(frozen=True)
class GeneratedCodes:
    """codes: [codebooks, frames] int64, the delay reverted, no stream BOS or EOS in it."""

    codes: torch.Tensor
    stopped_by: Literal["eos", "length"]


def generate_codes(
    model: HiggsAudioModel,
    prompt: ModelInputs,
    *,
    max_frames: int,
    sampling: Sampling,
    seed: int,
    guidance: Guidance | None = None,
) -> GeneratedCodes:
    """Speak after `prompt`, one sample that ends with <|audio_out_bos|>, for at most `max_frames` frames.

    The same seed gives the same codes (on one machine). The model's training mode and the random state of training
    are as before afterwards.
    """
    assert prompt["input_ids"].shape[0] == 1, "boson's generate takes one sample at a time"
    config = model.config
    inputs = prompt.to(model.device)
    # generate makes the segment locations itself, one sample being all there is
    kwargs = {name: tensor for name, tensor in inputs.items() if name != "audio_out_ids_start_group_loc"}
    rules = codes_as_served(model) if sampling.as_served else nullcontext()
    with evaluation_mode(model), torch.random.fork_rng(devices=_cuda_devices(model)), guided(model, guidance), rules:
        tokens, segments = model.generate(
            **kwargs,
            max_new_tokens=stream_length(config, max_frames),
            eos_token_id=[config.audio_eos_token_id],
            pad_token_id=config.pad_token_id,
            audio_out_bos_token_id=config.audio_out_bos_token_id,
            audio_eos_token_id=config.audio_eos_token_id,
            seed=seed,
            use_cache=True,
            synced_gpus=False,  # the whole model is here, and other ranks have other things to say
            **_sampling_kwargs(sampling),
        )
    stopped = int(tokens[0, -1]) == config.audio_eos_token_id
    codes = read_stream(segments[-1].clone().cpu(), config)
    return GeneratedCodes(codes=codes[:, :max_frames], stopped_by="eos" if stopped else "length")


def max_frames_for(seconds: float, *, sampling_rate: int, hop_length: int) -> int:
    """Code frames that hold `seconds` of audio; at least one."""
    return max(1, math.ceil(seconds * sampling_rate / hop_length))


def _sampling_kwargs(sampling: Sampling) -> dict[str, object]:
    if sampling.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "ras_win_len": None}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "ras_win_len": sampling.ras_window,
        "ras_win_max_num_repeat": sampling.ras_max_repeats,
    }


def stream_length(config, num_frames: int) -> int:
    """Columns of a stream of `num_frames` frames: stream BOS and EOS, and the delay."""
    return num_frames + 2 + (config.audio_num_codebooks - 1 if config.use_delay_pattern else 0)


def read_stream(stream: torch.Tensor, config) -> torch.Tensor:
    """[codebooks, columns] as generated, from stream BOS on -> [codebooks, frames] up to the first stream EOS."""
    if config.use_delay_pattern:
        if stream.shape[1] < config.audio_num_codebooks:
            return stream[:, :0]
        stream = revert_delay_pattern(stream)
    frames = stream[:, 1:]
    ended = (frames == config.audio_stream_eos_id).any(dim=0).nonzero().flatten()
    if ended.numel():
        frames = frames[:, : int(ended[0])]
    return frames.clamp(max=config.audio_codebook_size - 1)  # a stream BOS in between stands for no sound


def _cuda_devices(model: HiggsAudioModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


@contextmanager
def evaluation_mode(model: HiggsAudioModel) -> Iterator[None]:
    """While open, the model is in evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
