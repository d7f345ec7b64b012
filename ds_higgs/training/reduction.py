"""One reduction of gradients per optimizer step, right at every ZeRO stage."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from ds_higgs.model.split_weights import whole_shape

GROUP_SIZE = 64  # gradients that are added up at once


@contextmanager
def reduce_once(engine: DeepSpeedEngine) -> Iterator["LocalGradients"]:
    """Keep gradients on this rank while open; on leaving, reduce them over the ranks in one pass.

    One reduction per optimizer step is right at every stage, with overlap and offload, and ranks may differ in which
    parameters got a gradient. DeepSpeed's `managed_gradient_accumulation: false` is no shorter way there: at stages 2
    and 3 it still reduces in every backward pass, in the order in which hooks fire, and it refuses to coalesce.
    """
    gradients = LocalGradients(engine.module.trained)
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
        low = [one for one in self.parameters if one.grad is not None and one.grad.dtype != torch.float32]
        for group in _groups(low):
            gradients = _converted([one.grad for one in group if one.grad is not None], [torch.float32] * len(group))
            known = [index for index, one in enumerate(group) if one in self._sums]
            if known:
                sums = [self._sums[group[index]] for index in known]
                torch._foreach_add_(sums, [gradients[index] for index in known])
            for parameter, gradient in zip(group, gradients, strict=True):
                self._sums.setdefault(parameter, gradient)
                parameter.grad = None

    def finish(self) -> torch.Tensor:
        """Put the sums in place, zeros where no micro-batch gave a gradient; return whether all are finite, [] bool."""
        for group in _groups(list(self._sums)):
            sums = [self._sums.pop(parameter) for parameter in group]
            for parameter, gradient in zip(group, _converted(sums, [one.dtype for one in group]), strict=True):
                _set_gradient(parameter, gradient)
        for parameter in self.parameters:
            if parameter.grad is None:
                zeros = torch.zeros(whole_shape(parameter), dtype=parameter.dtype, device=parameter.device)
                _set_gradient(parameter, zeros)
        return all_finite([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def drop(self) -> None:
        self._sums.clear()
        for parameter in self.parameters:
            parameter.grad = None


def all_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[] bool: whether no element is infinite or NaN; on a GPU a few kernels for all tensors, and no waiting."""
    return torch.stack(torch._foreach_norm(tensors, torch.inf)).isfinite().all()


def look_for_overflow_at_once(engine: DeepSpeedEngine) -> None:
    """Have DeepSpeed look at all reduced gradients together: its own loop launches 13 kernels for each of them.

    On a GPU that is more than a whole micro-batch's forward and backward pass. Stage 3 looks at one flat buffer
    already, offloading at each gradient as it is copied.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() not in (1, 2) or optimizer.cpu_offload:
        return

    def has_overflow() -> torch.Tensor:
        gradients = [gradient for group in optimizer.averaged_gradients.values() for gradient in group or ()]
        gradients = [gradient for gradient in gradients if gradient is not None and gradient.numel() > 0]
        return ~all_finite(gradients) if gradients else torch.zeros((), dtype=torch.bool, device=engine.device)

    optimizer.has_overflow_partitioned_grads_serial = lambda: has_overflow().view(1)


def _groups(parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
    """As many at once as one kernel takes: what is converted besides the sums stays small."""
    for first in range(0, len(parameters), GROUP_SIZE):
        yield parameters[first : first + GROUP_SIZE]


def _converted(tensors: list[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """Copies in other dtypes; on a GPU a kernel for all of them rather than for each."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, tensors)
    return copies


def _set_gradient(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """Set a whole gradient, also where ZeRO-3 has left nothing of the parameter: torch wants the two of one shape."""
    if parameter.shape == gradient.shape:
        parameter.grad = gradient
        return
    held = parameter.data
    parameter.data = gradient
    parameter.grad = gradient
    parameter.data = held
