"""Copies of state dicts in CPU memory, pinned where they come from a GPU, in buffers that the next copy uses again."""

import copy
from collections.abc import Mapping
from typing import Any

import torch


class HostCopies:
    """The copies of one save at a time: those of the last one are gone once `begin` is called."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """Give all buffers free: what was copied into them is of no use any more."""
        self._used = 0

    def copy(self, state: Mapping[str, Any]) -> Any:
        """A state dict that does not change with the one that it is of; ready when this returns."""
        copied = self._copied(state)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # copies into pinned memory are only begun so far
        return copied

    def _copied(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._buffer_like(value).copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            twin = copy.copy(value)  # of its own class, with what hangs on it, such as a module's `_metadata`
            twin.update({key: self._copied(one) for key, one in value.items()})
            return twin
        if type(value) in (list, tuple):
            return type(value)(self._copied(one) for one in value)
        return copy.deepcopy(value)

    def _buffer_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """The next buffer, made anew where the tensor that comes now is another than last time."""
        number, self._used = self._used, self._used + 1
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[number]
        if buffer.shape != tensor.shape or buffer.dtype != tensor.dtype or buffer.is_pinned() < tensor.is_cuda:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[number] = buffer
        return buffer
