"""Liger's kernels with shapes alone, for a simulated GPU: as many launches as the real ones, and as much kept."""

import sys
import types

import torch

MULTIPROCESSORS = 132  # of an H100 or H200: Liger's RMSNorm sums its weight's gradient in one part each


@torch.library.custom_op("simulated::one_kernel", mutates_args=())
def one_kernel(inputs: list[torch.Tensor], shaped_as: list[torch.Tensor]) -> list[torch.Tensor]:
    """One launch that reads `inputs` and writes tensors shaped as others."""
    raise NotImplementedError("has shapes alone")


@torch.library.custom_op("simulated::one_kernel_in_place", mutates_args={"written"})
def one_kernel_in_place(inputs: list[torch.Tensor], written: list[torch.Tensor]) -> None:
    """One launch that reads `inputs` and overwrites `written`."""
    raise NotImplementedError("has shapes alone")


@one_kernel.register_fake
def _(inputs, shaped_as):
    return [torch.empty_like(tensor) for tensor in shaped_as]


@one_kernel_in_place.register_fake
def _(inputs, written):
    return None


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a number a row; makes the weight's gradient too, frozen or not."""

    @staticmethod
    def forward(ctx, hidden, weight):
        scale = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(hidden, weight, scale)
        return one_kernel([hidden, weight], [hidden])[0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, scale = ctx.saved_tensors
        parts = torch.empty(MULTIPROCESSORS, weight.shape[0], dtype=torch.float32, device=weight.device)
        grad_hidden, parts = one_kernel([grad, hidden, weight, scale], [hidden, parts])
        parts.sum(0)
        return grad_hidden, None


class _SwiGLU(torch.autograd.Function):
    """Writes its gradients over the gate and up that it kept."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return one_kernel([gate, up], [gate])[0]

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        one_kernel_in_place([grad], [gate, up])
        return gate, up


class _Rope(torch.autograd.Function):
    """Queries and keys in place, in one launch."""

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        one_kernel_in_place([cos, sin], [query, key])
        return query.view_as(query), key.view_as(key)

    @staticmethod
    def backward(ctx, *grads):
        grads = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads]  # as the kernel wants them
        one_kernel_in_place(list(ctx.saved_tensors), grads)
        return *grads, None, None


def install() -> None:
    """Put `liger_kernel.transformers.functional` where imports find it."""
    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_rms_norm = lambda hidden, weight, *_: _RMSNorm.apply(hidden, weight)
    functional.liger_swiglu = _SwiGLU.apply
    functional.liger_rope = _Rope.apply
    package = types.ModuleType("liger_kernel.transformers")
    package.functional = functional
    sys.modules |= {"liger_kernel": types.ModuleType("liger_kernel"), package.__name__: package}
    sys.modules[functional.__name__] = functional
