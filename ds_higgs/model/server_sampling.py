"""Which codes vLLM-Omni lets a model draw: stricter than boson's generate, so a model may end elsewhere there.

As its talker has it (higgs_audio_v2, December 2025): while a codebook waits for its turn, stream BOS alone; then no
stream BOS, and stream EOS in the first codebook alone. That EOS begins the ramp-down, in which the codebooks end
one after another, each with EOS alone from its turn on, and the ones before their turn with codes alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel

from ds_higgs.errors import UserError


@contextmanager
def codes_as_served(model: HiggsAudioModel) -> Iterator[None]:
    """While open, `model.generate` draws codes by vLLM-Omni's rules.

    Raises:
        UserError: the model has no delay pattern, without which that server knows no model.
    """
    config = model.config
    if not config.use_delay_pattern:
        raise UserError("--sampler vllm-omni: the model has no delay pattern, and vLLM-Omni serves none without")
    sample = model._sample_audio_tokens

    def sample_what_is_allowed(**arguments: Any) -> tuple:
        logits, delay, remaining = (arguments[name] for name in ("audio_logits", "num_delay", "num_remaining_delays"))
        allowed = allowed_codes(
            logits.shape[1],
            logits.shape[2],
            delay,
            remaining,
            bos=config.audio_stream_bos_id,
            eos=config.audio_stream_eos_id,
        )
        return sample(**{**arguments, "audio_logits": logits.masked_fill(~allowed.to(logits.device), float("-inf"))})

    model._sample_audio_tokens = sample_what_is_allowed
    try:
        yield
    finally:
        del model._sample_audio_tokens


def allowed_codes(
    codebooks: int, codebook_size: int, delay: int, remaining: int | None, *, bos: int, eos: int
) -> torch.Tensor:
    """[codebooks, codebook_size] bool: what may be drawn for one column.

    Args:
        delay: the last codebook that has begun.
        remaining: codebooks that have not ended; None before the first one ends.
    """
    allowed = torch.ones((codebooks, codebook_size), dtype=torch.bool)
    allowed[:, [bos, eos]] = False
    if remaining is None:
        allowed[0, eos] = True
        forced, code = slice(delay + 1, None), bos
    else:
        forced, code = slice(0, codebooks - remaining), eos
    allowed[forced] = False
    allowed[forced, code] = True
    return allowed
