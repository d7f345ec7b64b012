"""The frozen base in 4 bits (nf4, by bitsandbytes), for cards of 16 GB."""

import torch
from transformers import BitsAndBytesConfig

from ds_higgs.errors import UserError
from ds_higgs.job.preflight import lacks_for_bitsandbytes

# What stays in full precision: the heads decide over 128,256 and 8 x 1026 classes, and LoRA may train them whole.
UNQUANTIZED_MODULES = ("audio_decoder_proj", "audio_tower", "audio_encoder_proj")


def check_quantization(quantization: str | None, *, device_type: str, zero_stage: int) -> None:
    """Check that `model.quantization` can work here, before anything is loaded.

    Raises:
        UserError: listing everything that is in the way.
    """
    if quantization is None:
        return
    problems = lacks_for_bitsandbytes(device_type)
    if zero_stage == 3:
        problems.append("zero.stage 3 cannot split packed 4-bit weights; use stage 0, 1 or 2")
    if problems:
        raise UserError.from_problems(f"model.quantization: {quantization} cannot be used:", problems)


def build_quantization_config(quantization: str | None, *, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What `from_pretrained` takes; None for no quantization.

    Args:
        dtype: of the matrix products.
    """
    if quantization is None:
        return None
    assert quantization == "nf4"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(UNQUANTIZED_MODULES),
    )
