"""Norm, SwiGLU and rotary embedding of a packed layer: as the model has them, in torch with less kept, or by Liger."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from ds_higgs.model.kernels import liger_rms_norm, liger_rotate, liger_swiglu

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LayerKernels:
    """The elementwise parts of a decoder layer.

    norm: the module and its input, [rows, hidden].
    swiglu: gate and up, [rows, intermediate] each, to silu(gate) * up.
    rotate: query and key [rows, heads, head_dim], cosine and sine [rows, head_dim].
    """

    norm: Callable[[LlamaRMSNorm, torch.Tensor], torch.Tensor]
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Pair]


def build_layer_kernels(choice: str, *, compiled: bool) -> LayerKernels:
    """Of "plain", "torch" and "liger"; `compiled` matters to "torch" alone."""
    if choice == "torch":
        return torch_kernels(compiled=compiled)
    return {"plain": plain_kernels, "liger": liger_kernels}[choice]()


def plain_kernels() -> LayerKernels:
    """The model's own operations."""
    return LayerKernels(
        norm=lambda norm, hidden: norm(hidden),
        swiglu=lambda gate, up: F.silu(gate) * up,
        rotate=lambda query, key, cos, sin: apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=1),
    )


def torch_kernels(*, compiled: bool = False) -> LayerKernels:
    """Torch's fused norm, and a SwiGLU and a rotary embedding that keep their inputs alone.

    Args:
        compiled: whether torch.compile makes one kernel of each of the latter's directions.
    """
    decorate = _compiled if compiled else _as_is
    swiglu, swiglu_backward = decorate(_swiglu), decorate(_swiglu_backward)
    rotate, rotate_back = decorate(_rotate), decorate(_rotate_back)
    return LayerKernels(
        norm=_rms_norm,
        swiglu=lambda gate, up: _SwiGLU.apply(gate, up, swiglu, swiglu_backward),
        rotate=lambda query, key, cos, sin: (
            _Rotary.apply(query, cos, sin, rotate, rotate_back),
            _Rotary.apply(key, cos, sin, rotate, rotate_back),
        ),
    )


def liger_kernels() -> LayerKernels:
    """Liger's, which has to be installed."""
    return LayerKernels(norm=liger_rms_norm, swiglu=liger_swiglu, rotate=liger_rotate)


def _rms_norm(norm: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps gate and up alone and computes silu again; `forward_of` and `backward_of` do it."""

    @staticmethod
    def forward(ctx, gate, up, forward_of, backward_of):
        ctx.save_for_backward(gate, up)
        ctx.backward_of = backward_of
        return forward_of(gate, up)

    @staticmethod
    def backward(ctx, grad):
        return *ctx.backward_of(grad, *ctx.saved_tensors), None, None


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Pair:
    grad_up = F.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class _Rotary(torch.autograd.Function):
    """Rotary embedding of [rows, heads, head_dim]; keeps the cosines and sines that all layers share."""

    @staticmethod
    def forward(ctx, states, cos, sin, forward_of, backward_of):
        ctx.save_for_backward(cos, sin)
        ctx.backward_of = backward_of
        return forward_of(states, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        return ctx.backward_of(grad, *ctx.saved_tensors), None, None, None, None


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    (first, second), (sin_first, sin_second) = _halves(states), _halves(sin.unsqueeze(1))
    rotated = states * cos.unsqueeze(1)
    rotated_first, rotated_second = _halves(rotated)
    rotated_first.addcmul_(second, sin_first, value=-1)
    rotated_second.addcmul_(first, sin_second)
    return rotated


def _rotate_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The transpose of `_rotate`."""
    (first, second), (sin_first, sin_second) = _halves(grad), _halves(sin.unsqueeze(1))
    rotated = grad * cos.unsqueeze(1)
    rotated_first, rotated_second = _halves(rotated)
    rotated_first.addcmul_(second, sin_second)
    rotated_second.addcmul_(first, sin_first, value=-1)
    return rotated


def _halves(states: torch.Tensor) -> Pair:
    first, second = states.chunk(2, dim=-1)
    return first, second


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _as_is(function: Callable) -> Callable:
    return function
