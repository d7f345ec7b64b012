"""Causal attention of packed rows: over a right-padded grid of samples, or over samples one after another.

Each takes query, key and value with fewer heads in key and value, and returns the query's shape.
"""

import torch
import torch.nn.functional as F


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of [batch, length, heads, head_dim] each, by torch."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    # Flash takes no fp32, and the memory-efficient kernel no shared heads: torch would write scores out.
    share_heads = not query.is_cuda or query.dtype in (torch.bfloat16, torch.float16)
    if not share_heads:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=share_heads).transpose(1, 2)


def flash_attention_2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As `sdpa`, by the flash-attn package."""
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value, causal=True)


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int
) -> torch.Tensor:
    """Of [rows, heads, head_dim] each, sample after sample, by torch's variable-length FlashAttention (CUDA alone).

    Args:
        ends: [samples + 1] int32, where each sample begins and the last one ends.
        longest: rows of the longest sample, or more.
    """
    from torch.nn.attention.varlen import varlen_attn

    causal = (-1, 0)
    out = varlen_attn(query, key, value, ends, ends, longest, longest, window_size=causal, enable_gqa=True)
    assert isinstance(out, torch.Tensor)
    return out
