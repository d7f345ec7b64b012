"""Process group, ranks, reductions and rank-zero logging; the same with and without a launcher."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_higgs.job import devices
from ds_higgs.job.extensions import prepare_compiler
from ds_higgs.job.logs import phase

GATHER_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Ranks:
    """This process among all: global rank, number of processes, rank on this machine."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_ranks() -> Ranks:
    """Ranks as the launcher gave them; one process where there is none (LOCAL_RANK unset or -1)."""
    local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=max(local_rank, 0),
    )


def init_process_group() -> Ranks:
    """Start torch.distributed through DeepSpeed: NCCL where there is a GPU, gloo otherwise.

    Raises:
        UserError: there is a GPU that torch cannot use.
    """
    devices.check_gpu_is_used()
    devices.prepare_allocator()
    prepare_compiler()
    import deepspeed

    ranks = read_ranks()
    complete_environment(ranks)
    if devices.uses_cuda():
        torch.cuda.set_device(ranks.local_rank)
    if not dist.is_initialized():
        # On the CPU DeepSpeed would compile one more all-reduce, for inference, that keeps 66 MB a rank in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if devices.uses_cuda() else "gloo"
        with phase("starting the process group"):
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        barrier()
    return ranks


def complete_environment(ranks: Ranks) -> None:
    """Set what a launcher sets, for a group of one where there is none: DeepSpeed would look for MPI."""
    defaults = {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()) if ranks.world_size == 1 else "29500",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def training_device(ranks: Ranks) -> torch.device:
    return torch.device("cuda", ranks.local_rank) if devices.uses_cuda() else torch.device("cpu")


def memory_bytes(device: torch.device) -> int:
    """Of the GPU; on a CPU this process's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return installed // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; the tensor itself where there is one process."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; all ranks have to call this together."""
    device = "cuda" if devices.uses_cuda() else "cpu"
    return all_reduce_sum(torch.tensor(float(flag), device=device)).item() > 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_bytes(content: bytes) -> list[bytes]:
    """Every rank's content, by rank, on every rank; in blocks, so that little of it takes GPU memory at once."""
    if world_size() == 1:
        return [content]
    lengths = _gather_objects(len(content))
    starts = range(0, max(lengths), GATHER_BLOCK_BYTES)
    blocks = [_gather_objects(content[start : start + GATHER_BLOCK_BYTES]) for start in starts]
    return [b"".join(block[rank] for block in blocks) for rank in range(len(lengths))]


def is_main_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def on_main_rank(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait, and raise on every rank what it raises there."""
    error: list[BaseException | None] = [None]
    if is_main_rank():
        try:
            action()
        except Exception as raised:
            error = [raised]
    if world_size() > 1:
        dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]


def _gather_objects(content: Any) -> list[Any]:
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, content)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
