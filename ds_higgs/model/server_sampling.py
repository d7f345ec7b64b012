"""Which codes vLLM-Omni lets a model draw: stricter than boson's generate, so a model may end elsewhere there.

As its talker has it (higgs_audio_v2, December 2025): while a codebook waits for its turn, stream BOS alone; then no
stream BOS, and stream EOS in the first codebook alone. That EOS begins the ramp-down, in which the codebooks end
one after another, each with EOS alone from its turn on, and the ones before their turn with codes alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel

from ds_higgs.errors import UserError

NOT_ENDING = -1  # of a row in which no codebook has ended, instead of how many have not


@contextmanager
def codes_as_served(model: HiggsAudioModel) -> Iterator[None]:
    """While open, `model.generate` draws codes by vLLM-Omni's rules.

    Raises:
        UserError: the model has no delay pattern, without which that server knows no model.
    """
    config = model.config
    check_can_be_served(config)
    sample = model._sample_audio_tokens

    def sample_what_is_allowed(**arguments: Any) -> tuple:
        logits, delay, remaining = (arguments[name] for name in ("audio_logits", "num_delay", "num_remaining_delays"))
        allowed = allowed_codes(
            torch.arange(logits.shape[1], device=logits.device),
            logits.shape[2],
            int(delay),
            torch.tensor([NOT_ENDING if remaining is None else int(remaining)], device=logits.device),
            bos=config.audio_stream_bos_id,
            eos=config.audio_stream_eos_id,
        )
        return sample(**{**arguments, "audio_logits": logits.masked_fill(~allowed, float("-inf"))})

    model._sample_audio_tokens = sample_what_is_allowed
    try:
        yield
    finally:
        del model._sample_audio_tokens


def check_can_be_served(config: HiggsAudioConfig) -> None:
    """Raise UserError for a model without the delay pattern, without which vLLM-Omni knows no model."""
    if not config.use_delay_pattern:
        raise UserError("--sampler vllm-omni: the model has no delay pattern, and vLLM-Omni serves none without")


def allowed_codes(
    codebooks: torch.Tensor, codebook_size: int, delay: int, remaining: torch.Tensor, *, bos: int, eos: int
) -> torch.Tensor:
    """[rows, codebooks, codebook_size] bool: what may be drawn for one column of every row.

    Args:
        codebooks: 0, 1, ... on the device of the answer.
        delay: the last codebook that has begun.
        remaining: [rows], codebooks that have not ended; NOT_ENDING before the first one ends.
    """
    ends = (remaining != NOT_ENDING).unsqueeze(1)
    waits = ~ends & (codebooks > delay)
    has_ended = ends & (codebooks < len(codebooks) - remaining.unsqueeze(1))
    allowed = (~(waits | has_ended)).unsqueeze(2).repeat(1, 1, codebook_size)
    allowed[:, :, bos] = waits
    allowed[:, :, eos] = has_ended | (~ends & (codebooks == 0))
    return allowed
