"""The elementwise parts of a packed layer as functions of tensors, of which torch.compile makes one kernel each.

What a gradient needs again is computed again where that is cheaper than keeping it: a norm's statistics, the activated
gate, and the masks of dropout, which are a hash of two numbers and the place in the tensor. Compiled, a mask drawn by
torch's own generator costs about a hundred integer operations an element and has to be kept; the hash costs sixteen.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

SEEDS = 4  # numbers of a place of dropout: two are used; 16 bytes keep what follows aligned


class Norm(NamedTuple):
    """An RMSNorm: its weight [hidden], which is frozen, and its epsilon."""

    weight: torch.Tensor
    epsilon: float


class Dropout(NamedTuple):
    """seeds: [SEEDS] int32 of this place and step; rate: the share that becomes 0."""

    seeds: torch.Tensor
    rate: float


def draw_seeds(*shape: int, device: torch.device) -> torch.Tensor:
    """[*shape, SEEDS] int32, drawn from the device's generator, whose state checkpoints hold."""
    return torch.randint(-(2**31), 2**31 - 1, (*shape, SEEDS), dtype=torch.int32, device=device)


def drop(values: torch.Tensor, dropout: Dropout, rows: torch.Tensor | None = None) -> torch.Tensor:
    """[rows, width] with a share of `rate` set to 0 and the rest scaled up; its own transpose.

    Args:
        rows: [rows] int64, the rows that these are of the tensor that was dropped; all of it in order by default.
    """
    kept = keep_mask(values.shape, dropout, values.device, rows)
    return torch.where(kept, values / (1 - dropout.rate), 0.0)


def keep_mask(
    shape: torch.Size, dropout: Dropout, device: torch.device, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """[rows, width] bool, True with the probability 1 - rate: a hash of the element's number and the seeds."""
    number_of_rows, width = shape
    row = torch.arange(number_of_rows, dtype=torch.int32, device=device) if rows is None else rows.to(torch.int32)
    number = row.unsqueeze(1) * width + torch.arange(width, dtype=torch.int32, device=device)
    bits = _mix(_mix(number + dropout.seeds[0]) ^ dropout.seeds[1])
    return bits >= int(dropout.rate * 2**32) - 2**31


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finalizer of int32 numbers: every bit of the result depends on every bit of the argument."""
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * -0x7A143595
    bits = (bits ^ (bits >> 13 & 0x7FFFF)) * -0x3D4D51CB
    return bits ^ (bits >> 16 & 0xFFFF)


def norm_rows(
    hidden: torch.Tensor,
    added: torch.Tensor | None,
    norm: Norm,
    dropout: Dropout | None,
    out_sum: torch.Tensor | None,
    out_same_sum: torch.Tensor | None,
    out_normed: torch.Tensor,
    out_dropped: torch.Tensor | None,
) -> None:
    """Write the sum of `hidden` and `added` [rows, hidden], twice, its norm, and what dropout leaves of that."""
    total = hidden if added is None else hidden + added
    exact = _exact(total)
    normed = (exact * _scale(exact, norm)).to(hidden.dtype) * norm.weight
    if out_sum is not None and out_same_sum is not None:
        out_sum.copy_(total)
        out_same_sum.copy_(total)
    out_normed.copy_(normed)
    if dropout is not None and out_dropped is not None:
        out_dropped.copy_(drop(normed, dropout))


def norm_rows_backward(
    grad_sum: torch.Tensor,
    grad_normed: torch.Tensor,
    grad_dropped: torch.Tensor | None,
    total: torch.Tensor,
    norm: Norm,
    dropout: Dropout | None,
    out: torch.Tensor,
) -> None:
    """Write the gradient of `total`, which was normalised, dropped, and passed on itself."""
    exact = _exact(total)
    grad = _through_dropout(grad_normed, grad_dropped, dropout)
    weighted = _exact(grad * norm.weight)
    scale = _scale(exact, norm)
    along = (weighted * exact).mean(dim=-1, keepdim=True)
    out.copy_(grad_sum + (weighted * scale - exact * (along * scale.pow(3))).to(out.dtype))


def _exact(values: torch.Tensor) -> torch.Tensor:
    """At least in fp32, where norms are computed."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _scale(exact: torch.Tensor, norm: Norm) -> torch.Tensor:
    return torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + norm.epsilon)


def _through_dropout(
    grad: torch.Tensor, grad_dropped: torch.Tensor | None, dropout: Dropout | None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    if dropout is None or grad_dropped is None:
        return grad
    return grad + drop(grad_dropped, dropout, rows)


def swiglu(gate: torch.Tensor, up: torch.Tensor, dropout: Dropout | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(gate) * up [rows, intermediate], and what dropout leaves of it."""
    active = F.silu(gate) * up
    return active, None if dropout is None else drop(active, dropout)


def swiglu_backward(
    grad: torch.Tensor,
    grad_dropped: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    grad = _through_dropout(grad, grad_dropped, dropout)
    sigmoid = torch.sigmoid(gate)
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


def spread(rows: torch.Tensor, row_of_cell: torch.Tensor) -> torch.Tensor:
    """[cells, ...]: cell i takes row row_of_cell[i], or the first where that is negative."""
    return rows[row_of_cell.clamp(min=0)]


def spread_rotated(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, row_of_cell: torch.Tensor) -> torch.Tensor:
    """As `spread`, of [rows, heads, head_dim] with their rotary embedding, cosines and sines [rows, head_dim]."""
    source = row_of_cell.clamp(min=0)
    first, second = rows[source].chunk(2, dim=-1)
    (cos_first, cos_second), (sin_first, sin_second) = (
        values[source].unsqueeze(1).chunk(2, dim=-1) for values in (cos, sin)
    )
    return torch.cat([first * cos_first - second * sin_first, second * cos_second + first * sin_second], dim=-1)


def collect(cells: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """The transpose of `spread`: row i has cell slot[i]."""
    return cells[slot]


def collect_rotated_back(cells: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """The transpose of `spread_rotated`."""
    first, second = cells[slot].chunk(2, dim=-1)
    (cos_first, cos_second), (sin_first, sin_second) = (values.unsqueeze(1).chunk(2, dim=-1) for values in (cos, sin))
    return torch.cat([first * cos_first + second * sin_second, second * cos_second - first * sin_first], dim=-1)


def collect_dropped(
    cells: torch.Tensor, slot: torch.Tensor, dropout: Dropout | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `collect`, of [cells, width], and what dropout leaves of it."""
    rows = cells[slot]
    return rows, None if dropout is None else drop(rows, dropout)


def collect_dropped_backward(
    grad: torch.Tensor, grad_dropped: torch.Tensor | None, row_of_cell: torch.Tensor, dropout: Dropout | None
) -> torch.Tensor:
    """The gradient of the cells; zero in the padding, where `row_of_cell` is negative."""
    row = row_of_cell.clamp(min=0)
    dropped = None if grad_dropped is None else grad_dropped[row]
    found = _through_dropout(grad[row], dropped, dropout, row)
    return torch.where((row_of_cell >= 0).unsqueeze(1), found, 0.0)
