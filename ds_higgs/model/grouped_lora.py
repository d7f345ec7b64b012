"""LoRA of projections that share an input as one operation: fewer kernels and less kept than one PEFT layer each.

PEFT runs every projection by itself: a dropout each, which keeps a copy of the input and a mask, two thin products, a
scaling and an addition of the whole output. Here the projections of one input share one dropout; their A matrices stand
side by side, so that the input is read once; and the B products are accumulated into the base's output. The adapters
stay PEFT's own parameters, so every file is as before. Layers that are more than a plain linear layer with one plain
adapter (DoRA, 4-bit bases, merged or disabled adapters) keep PEFT's way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from ds_higgs.model.split_weights import is_split


class _Adapted(NamedTuple):
    """The parts of one adapted projection: weight [out, in], down [rank, in], up [out, rank]."""

    weight: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    dropout: float
    scaling: float


class Group(NamedTuple):
    """Projections of one input whose adapters are plain and alike."""

    parts: Sequence[_Adapted]

    @property
    def dropout(self) -> float:
        return self.parts[0].dropout

    def apply(
        self, hidden: torch.Tensor, dropped: torch.Tensor | None = None, onto: "Onto | None" = None
    ) -> tuple[torch.Tensor, ...]:
        """Every projection of `hidden` [rows, in].

        Args:
            dropped: `hidden` after the adapters' dropout; None leaves that to this call.
            onto: what a single projection is added to, in place, and which is returned.
        """
        weights, downs, ups, dropouts, scalings = zip(*self.parts, strict=True)
        assert onto is None or len(weights) == 1
        settings = _Settings(dropouts[0] if dropped is None else 0.0, scalings[0], len(weights), onto and onto.start)
        total = None if onto is None else onto.total
        return _GroupedLora.apply(hidden, dropped, total, settings, *weights, *downs, *ups)


class Onto(NamedTuple):
    """Rows of a tensor, from `start` on."""

    total: torch.Tensor
    start: int


class _Settings(NamedTuple):
    """start: the first row of what is added to."""

    dropout: float
    scaling: float
    num_projections: int
    start: int | None


def find_group(hidden: torch.Tensor, projections: Sequence[nn.Module]) -> Group | None:
    """The projections as one operation; None where one of them has no plain adapter, or another one than the rest."""
    parts = [part for part in (_plain_adapter(one, hidden) for one in projections) if part is not None]
    return Group(parts) if len(parts) == len(projections) and _alike(parts) else None


def project(hidden: torch.Tensor, projections: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Apply every projection to `hidden` [rows, in]; those with a plain adapter as one operation.

    Equal to calling them one by one up to rounding; where there is dropout, they share one mask.
    """
    parts = [_plain_adapter(projection, hidden) for projection in projections]
    grouped = [part for part in parts if part is not None]
    if not _alike(grouped):
        return [projection(hidden) for projection in projections]
    outputs = iter(Group(grouped).apply(hidden))
    return [
        projection(hidden) if part is None else next(outputs)
        for projection, part in zip(projections, parts, strict=True)
    ]


def project_one_by_one(hidden: torch.Tensor, projections: Sequence[nn.Module]) -> list[torch.Tensor]:
    """As `project`, every projection by its own forward."""
    return [projection(hidden) for projection in projections]


def _alike(parts: Sequence[_Adapted]) -> bool:
    return len({(part.dropout, part.scaling) for part in parts}) == 1


def _plain_adapter(projection: nn.Module, hidden: torch.Tensor) -> _Adapted | None:
    """The parts of a projection that is W x + s B A drop(x) and nothing else; None for any other."""
    if type(projection) is not LoraLinear or projection.disable_adapters or projection.merged:
        return None
    base, (name, *others) = projection.base_layer, projection.active_adapters
    if others or projection.lora_variant or type(base) is not nn.Linear or projection.fan_in_fan_out:
        return None
    down, up, dropout = projection.lora_A[name], projection.lora_B[name], projection.lora_dropout[name]
    if base.bias is not None or up.bias is not None or base.weight.requires_grad or is_split(base.weight):
        return None  # ZeRO-3 gathers split weights around their own module's forward
    if not hidden.dtype == base.weight.dtype == down.weight.dtype or torch.is_autocast_enabled(hidden.device.type):
        return None
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return _Adapted(base.weight, down.weight, up.weight, rate, projection.scaling[name])


class _GroupedLora(torch.autograd.Function):
    """y_i = x W_i^T + s drop(x) A_i^T B_i^T for projections i of one input x [rows, in]; every W_i is frozen.

    The thin product comes first and the base's is added to it: that one is bound by its FLOPs, so that reading what is
    there costs it no time, while a thin product would be bound by reading and writing it.
    """

    @staticmethod
    def forward(ctx, hidden, dropped, total, settings, *matrices):
        dropout, scaling, num_projections, start = settings
        weights, downs, ups = _thirds(matrices, num_projections)
        mask, ctx.is_given = None, dropped is not None
        if dropped is None:
            dropped, mask = torch.native_dropout(hidden, dropout, True) if dropout > 0 else (hidden, None)
        down = torch.cat(list(downs)) if num_projections > 1 else downs[0]  # [ranks, in]
        low = _scaled_product(dropped, down.t(), scaling)  # [rows, ranks]
        ranks = [matrix.shape[0] for matrix in downs]
        ctx.save_for_backward(dropped, mask, low, down, *weights, *ups)
        ctx.dropout, ctx.scaling, ctx.ranks = dropout, scaling, ranks
        ctx.block = None if start is None else slice(start, start + len(hidden))
        if total is not None:
            total[ctx.block].addmm_(low, ups[0].t()).addmm_(hidden, weights[0].t())
            ctx.mark_dirty(total)
            return (total,)
        parts = zip(weights, ups, low.split(ranks, dim=1), strict=True)
        return tuple((part @ up.t()).addmm_(hidden, weight.t()) for weight, up, part in parts)

    @staticmethod
    def backward(ctx, *grads):
        dropped, mask, low, down, *rest = ctx.saved_tensors
        grad_total = None if ctx.block is None else grads[0]
        grads = grads if ctx.block is None else (grads[0][ctx.block],)
        weights, ups = rest[: len(grads)], rest[len(grads) :]
        grad_low = torch.empty_like(low)
        for grad, up, part in zip(grads, ups, grad_low.split(ctx.ranks, dim=1), strict=True):
            torch.addmm(part, grad, up, beta=0, alpha=ctx.scaling, out=part)
        grad_ups = [grad.t() @ part for grad, part in zip(grads, low.split(ctx.ranks, dim=1), strict=True)]
        grad_downs = (grad_low.t() @ dropped).split(ctx.ranks)
        grad_hidden = grad_dropped = None
        if ctx.needs_input_grad[0]:
            through_adapters = _grad_through_adapters(grad_low, down, mask, keep=1 - ctx.dropout)
            if ctx.is_given:
                grad_hidden, grad_dropped = _grad_through_bases(grads, weights), through_adapters
            else:
                grad_hidden = _grad_through_bases(grads, weights, onto=through_adapters)
        return grad_hidden, grad_dropped, grad_total, None, *(None for _ in weights), *grad_downs, *grad_ups


def _thirds(matrices: Sequence[torch.Tensor], size: int) -> list[Sequence[torch.Tensor]]:
    return [matrices[start : start + size] for start in range(0, 3 * size, size)]


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling * left @ right` in one kernel; with beta 0 the first argument is not read."""
    return torch.addmm(left.new_empty(1, 1), left, right, beta=0, alpha=scaling)


def _grad_through_bases(
    grads: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], *, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of what comes through each base, added to `onto` in place."""
    pairs = list(zip(grads, weights, strict=True))
    total = pairs[0][0] @ pairs[0][1] if onto is None else onto
    for grad, weight in pairs if onto is not None else pairs[1:]:
        total.addmm_(grad, weight)
    return total


def _grad_through_adapters(
    grad_low: torch.Tensor, down: torch.Tensor, mask: torch.Tensor | None, *, keep: float
) -> torch.Tensor:
    """What comes through A and the dropout. keep: the dropout's share that is kept."""
    if mask is None:
        return grad_low @ down
    return _scaled_product(grad_low, down, 1 / keep).mul_(mask)
