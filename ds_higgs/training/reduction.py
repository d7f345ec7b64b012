"""One reduction of gradients per optimizer step, right at every ZeRO stage."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from deepspeed import DeepSpeedEngine
from torch import nn


@contextmanager
def reduce_once(engine: DeepSpeedEngine) -> Iterator["LocalGradients"]:
    """Keep gradients on this rank while open; on leaving, reduce them over the ranks in one pass.

    One reduction per optimizer step is right at every stage, with overlap and offload, and ranks may differ in which
    parameters got a gradient. DeepSpeed's `managed_gradient_accumulation: false` is no shorter way there: at stages 2
    and 3 it still reduces in every backward pass, in the order in which hooks fire, and it refuses to coalesce.
    """
    gradients = LocalGradients([parameter for parameter in engine.module.parameters() if parameter.requires_grad])
    with _unreduced(engine):
        try:
            yield gradients
        except BaseException:
            gradients.drop()  # a failing rank must not enter a reduction that the others are not in
            raise
    if engine.zero_optimization_stage() == 0:
        engine.allreduce_gradients()


def _unreduced(engine: DeepSpeedEngine) -> AbstractContextManager[None]:
    return engine.no_sync() if engine.zero_optimization_stage() == 0 else engine.coalesce_grad_reduction()


class LocalGradients:
    """This rank's gradients of one optimizer step, accumulated in fp32 over its micro-batches."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self._sums: dict[nn.Parameter, torch.Tensor] = {}

    def collect(self) -> None:
        """Move low-precision gradients of a micro-batch into the fp32 sums; fp32 ones accumulate where they are."""
        for parameter in self.parameters:
            if parameter.grad is None or parameter.grad.dtype == torch.float32:
                continue
            if parameter in self._sums:
                self._sums[parameter].add_(parameter.grad)
            else:
                self._sums[parameter] = parameter.grad.float()
            parameter.grad = None

    def finish(self) -> torch.Tensor:
        """Put the sums in place, zeros where no micro-batch gave a gradient; return whether all are finite, [] bool."""
        gradients = [self._finish(parameter) for parameter in self.parameters]
        return torch.stack(torch._foreach_norm(gradients)).isfinite().all()

    def _finish(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter in self._sums:
            return _set_gradient(parameter, self._sums.pop(parameter).to(parameter.dtype))
        if parameter.grad is None:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: of a parameter that ZeRO-3 splits
            return _set_gradient(parameter, torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
        return parameter.grad

    def drop(self) -> None:
        self._sums.clear()
        for parameter in self.parameters:
            parameter.grad = None


def _set_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """Set a whole gradient, also where ZeRO-3 has left nothing of the parameter: torch wants the two of one shape."""
    held = parameter.data
    parameter.data = gradient
    parameter.grad = gradient
    parameter.data = held
    return gradient
