"""The account of a simulated device: kernels by operation and shapes, memory alive, and the time that they predict."""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

aten = torch.ops.aten
# Operations that read, of their first tensor, only what their indices name; or nothing of it.
GATHERS = {aten.embedding.default, aten.index_select.default, aten.nll_loss_forward.default}
SCATTERS = {aten.index_copy_.default}
FILLS = {
    *(aten.new_zeros.default, aten.new_full.default, aten.zeros_like.default, aten.full_like.default),
    *(aten.zero_.default, aten.fill_.Scalar, aten.nll_loss_backward.default),
}
ALLOCATION_STEP = 512  # bytes: what torch's allocator rounds to


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_moved(func, tensors: list[torch.Tensor], results: list[torch.Tensor]) -> int:
    """What a kernel reads and writes: all of its tensors, but for those that it only indexes or overwrites."""
    if func in FILLS:
        tensors = []
    elif func in GATHERS:
        tensors = [*tensors[1:], *results]
    elif func in SCATTERS:
        _, index, source = tensors
        tensors, results = [index, source], [source]
    return sum(num_bytes(tensor) for tensor in (*tensors, *results) if tensor.device.type == "cuda")


class Work(NamedTuple):
    """What one kind of operation was launched with, on tensors of the same shapes."""

    launches: int = 0
    flops: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0

    def plus(self, other: "Work", times: int = 1) -> "Work":
        """The sum of both, `other` taken so many times."""
        return Work(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass
class Account:
    """What a device would have done. `memory` is bytes alive by storage; workspaces of kernels count in `peak`."""

    work: dict[tuple[str, str], Work] = field(default_factory=dict)  # by operation and shapes
    waits: list[str] = field(default_factory=list)
    computed_on_cpu: Counter = field(default_factory=Counter)
    attention: Counter = field(default_factory=Counter)
    memory: dict[int, int] = field(default_factory=dict)
    alive: int = 0
    peak: int = 0

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.work.values())

    def forget_work(self) -> None:
        """Start counting work anew; memory stays, and its peak becomes what is alive now."""
        for counts in (self.work, self.waits, self.computed_on_cpu, self.attention):
            counts.clear()
        self.peak = self.alive

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage as alive until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.memory:
            return
        self.memory[key] = round_up(storage.nbytes(), ALLOCATION_STEP)
        self.alive += self.memory[key]
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.alive -= self.memory.pop(key)


@dataclass(frozen=True)
class Device:
    """What predicts the time of a kernel: the larger of FLOPs and bytes over these, and a least time."""

    flops: float
    bytes_per_second: float
    least_seconds: float = 2e-6

    def seconds(self, flops: int, bytes_moved: int) -> float:
        return max(flops / self.flops, bytes_moved / self.bytes_per_second, self.least_seconds)


# Measured peak of large bf16 products, and 85 % of the data sheet's bandwidth.
H200 = Device(flops=790e12, bytes_per_second=0.85 * 4.8e12)


def flash_backward_workspace(query: torch.Tensor, key: torch.Tensor) -> int:
    """Bytes of what FlashAttention-2's backward allocates for itself: [batch, heads, length, head_dim] each.

    Samples one after another, [rows, heads, head_dim], count as one that is as long.

    An fp32 sum for the query's gradient and two sums a row; with fewer key than query heads, key and value gradients
    of every query head too, before they are added up.
    """
    if query.dim() == 3:
        query, key = (states.transpose(0, 1).unsqueeze(0) for states in (query, key))
    batch, heads, length, head_dim = query.shape
    rows = batch * heads * round_up(length, 128)
    expanded = 2 * batch * heads * key.shape[2] * head_dim * key.element_size() if key.shape[1] != heads else 0
    return rows * (round_up(head_dim, 32) * 4 + 4) + expanded
