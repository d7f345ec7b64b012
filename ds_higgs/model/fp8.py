"""The frozen base's products in 8-bit floats, with a scale for every row of each factor: an experiment, for speed.

Twice the FLOPs of bf16 on GPUs from Ada and Hopper on, at the price of rounding both factors to 3 bits of mantissa. The
weights are cast once for each direction, beside the bf16 ones, which PEFT needs; only the gradient of the input is
computed, and nothing is kept for it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from torch import nn

FORMAT = torch.float8_e4m3fn
MULTIPLE = 16  # of both sizes of a weight: what the kernels take


class Scaled(NamedTuple):
    """values [rows, columns] in FORMAT times scale [rows, 1] fp32."""

    values: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> "Scaled":
        """`rows`, each scaled so that its largest value is the format's."""
        largest = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12)
        scale = largest / torch.finfo(FORMAT).max
        return cls((rows / scale).to(FORMAT).contiguous(), scale)


def scaled_product(left: torch.Tensor, right: Scaled) -> torch.Tensor:
    """left [m, k] times the transpose of right [n, k]: [m, n] bf16."""
    cast, by_row = Scaled.of(left), F.ScalingType.RowWise
    return F.scaled_mm(cast.values, right.values.t(), cast.scale, by_row, right.scale.t(), by_row)


class _Product(torch.autograd.Function):
    """x W^T for a frozen W, cast by output for it and by input for its gradient."""

    @staticmethod
    def forward(ctx, hidden, by_output, by_input):
        ctx.by_input = by_input
        return scaled_product(hidden, by_output)

    @staticmethod
    def backward(ctx, grad):
        return scaled_product(grad, ctx.by_input), None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer without bias, in bf16, whose products are in fp8."""

    _casts: tuple[int, Scaled, Scaled] | None = None

    @classmethod
    def like(cls, linear: nn.Linear) -> "Fp8Linear":
        """The same layer, with the same weight."""
        assert linear.bias is None
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = linear.weight
        return made

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        product = _Product.apply(hidden.flatten(0, -2), *self._cast_weight())
        return product.unflatten(0, hidden.shape[:-1])

    @torch.no_grad()
    def _cast_weight(self) -> tuple[Scaled, Scaled]:
        """By output and by input; cast again when the weight has changed."""
        version = self.weight._version
        if self._casts is None or self._casts[0] != version:
            self._casts = (version, Scaled.of(self.weight), Scaled.of(self.weight.t()))
        return self._casts[1:]


def use_fp8(model: HiggsAudioModel) -> None:
    """Make every projection of `model`'s decoder layers an Fp8Linear, in place; before LoRA."""
    for layer in model.layers:
        for parent in layer.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear and all(size % MULTIPLE == 0 for size in child.weight.shape):
                    setattr(parent, name, Fp8Linear.like(child))
