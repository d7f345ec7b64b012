"""Chooses kernels for norms, SwiGLU, rotary embedding and attention, and puts Liger's on this model's own modules."""

import functools
import inspect

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ds_higgs.errors import UserError
from ds_higgs.job.preflight import is_installed

FLASH_CAPABILITY = (8, 0)


def choose_kernels(choice: str, *, device_type: str) -> str:
    """Resolve `memory.kernels`: "auto" is "liger" where liger-kernel is installed and the device is a CUDA one.

    Raises:
        UserError: if "liger" is asked for and cannot work.
    """
    usable = device_type == "cuda" and is_installed("liger_kernel")
    if choice == "liger" and not usable:
        missing = f"there is none here (device {device_type})" if device_type != "cuda" else "it is not installed"
        raise UserError(
            f"memory.kernels: liger needs a CUDA device and the package liger-kernel, and {missing}; "
            "use `auto` or `torch`, or `pip install liger-kernel`"
        )
    if choice == "auto":
        return "liger" if usable else "torch"
    return choice


def choose_compiled(choice: str, *, kernels: str, device_type: str) -> bool:
    """Resolve `memory.compile`: "auto" compiles torch's kernels on a CUDA device where Triton is installed."""
    return choice == "auto" and kernels == "torch" and device_type == "cuda" and is_installed("triton")


def choose_attention(choice: str, *, device_type: str, dtype: torch.dtype, packed_rows: bool = True) -> str:
    """Resolve `memory.attention`: "auto" is SDPA, whose flash kernels packed rows reach without a mask.

    Raises:
        UserError: if "flash_attention_2" or "varlen" is asked for and cannot work.
    """
    if choice in ("auto", "sdpa"):
        return "sdpa"
    problems = []
    if device_type != "cuda":
        problems.append(f"it needs a CUDA device, found {device_type}")
    elif choice == "varlen" and torch.cuda.get_device_capability() < FLASH_CAPABILITY:
        problems.append("it needs a GPU of compute capability 8.0 or higher (Ampere)")
    if choice == "flash_attention_2" and not is_installed("flash_attn"):
        problems.append("the package flash-attn is not installed")
    if choice == "varlen" and not _has_varlen():
        problems.append(f"it needs torch.nn.attention.varlen with shared heads, found torch {torch.__version__}")
    if choice == "varlen" and not packed_rows:
        problems.append("it needs memory.packed_rows: true")
    if dtype not in (torch.bfloat16, torch.float16):
        problems.append(f"it needs bf16 (zero.precision), found {str(dtype).removeprefix('torch.')}")
    if problems:
        raise UserError.from_problems(f"memory.attention: {choice} cannot be used:", problems)
    return choice


def apply_liger_kernels(model: HiggsAudioModel) -> None:
    """Run the decoder's norms and the SwiGLU of both feed-forward paths by liger-kernel, in place.

    LoRA layers stay as they are, and the Whisper tower has neither. The rotary embedding of packed rows is
    `liger_rotate`.
    """
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = functools.partial(liger_rms_norm, module)
        elif isinstance(module, LlamaMLP):
            assert module.config.hidden_act == "silu", "Liger's SwiGLU is for silu"
            module.forward = functools.partial(_liger_mlp, module)


def liger_rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate [rows, heads, head_dim] queries and keys with [rows, head_dim] cosines and sines."""
    from liger_kernel.transformers.functional import liger_rope

    heads_first = (states.unsqueeze(0).transpose(1, 2) for states in (query, key))  # [1, heads, rows, head_dim]
    query, key = liger_rope(*heads_first, cos.unsqueeze(0), sin.unsqueeze(0))
    return query.transpose(1, 2).squeeze(0), key.transpose(1, 2).squeeze(0)


def liger_rms_norm(norm: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """What `norm` does to [..., hidden]."""
    from liger_kernel.transformers import functional

    # in_place would overwrite the incoming gradient, which here may be a view that others read.
    return functional.liger_rms_norm(hidden_states, norm.weight, norm.variance_epsilon, 0.0, "llama", False)


def liger_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; its backward pass overwrites both."""
    from liger_kernel.transformers import functional

    return functional.liger_swiglu(gate, up)


def _liger_mlp(mlp: LlamaMLP, hidden_states: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(liger_swiglu(mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)))


def _has_varlen() -> bool:
    if not is_installed("torch.nn.attention.varlen"):
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
