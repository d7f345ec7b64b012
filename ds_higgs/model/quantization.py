"""The frozen base in 4 bits (nf4, by bitsandbytes), for cards of 16 GB, or its products in fp8; what each needs."""

import torch
from transformers import BitsAndBytesConfig

from ds_higgs.errors import UserError
from ds_higgs.job.preflight import lacks_for_bitsandbytes

# What stays in full precision: the heads decide over 128,256 and 8 x 1026 classes, and LoRA may train them whole.
UNQUANTIZED_MODULES = ("audio_decoder_proj", "audio_tower", "audio_encoder_proj")
FP8_CAPABILITY = (8, 9)  # the first with products in fp8: Ada
_WEIGHTS = {"nf4": "packed 4-bit", "fp8": "fp8"}


def check_quantization(
    quantization: str | None, *, device_type: str, zero_stage: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Check that `model.quantization` can work here, before anything is loaded.

    Raises:
        UserError: listing everything that is in the way.
    """
    if quantization is None:
        return
    problems = _lacks_for_fp8(device_type, dtype) if quantization == "fp8" else lacks_for_bitsandbytes(device_type)
    if zero_stage == 3:
        problems.append(f"zero.stage 3 cannot split {_WEIGHTS[quantization]} weights; use stage 0, 1 or 2")
    if problems:
        raise UserError.from_problems(f"model.quantization: {quantization} cannot be used:", problems)


def _lacks_for_fp8(device_type: str, dtype: torch.dtype) -> list[str]:
    problems = []
    if device_type != "cuda":
        problems.append(f"it needs a CUDA device, found {device_type}")
    elif (capability := torch.cuda.get_device_capability()) < FP8_CAPABILITY:
        found = ".".join(map(str, capability))
        problems.append(f"it needs a GPU of compute capability 8.9 or higher (Ada, Hopper), found {found}")
    if not hasattr(torch.nn.functional, "scaled_mm"):
        problems.append(f"it needs torch.nn.functional.scaled_mm, found torch {torch.__version__}")
    if dtype != torch.bfloat16:
        problems.append(f"it needs bf16 (zero.precision), found {str(dtype).removeprefix('torch.')}")
    return problems


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
