"""Doctor: what the operating system, the container and the launcher allow."""

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds_higgs.commands.doctor.finding import Finding, judge
from ds_higgs.errors import UserError
from ds_higgs.job.extensions import prepare_compiler
from ds_higgs.job.preflight import check_folder_writable

GIB = 2**30
MIN_OPEN_FILES = 4096  # sockets between ranks, loader workers, the code cache's shards
MIN_SHARED_MEMORY = GIB  # loader workers hand batches over there, DeepSpeed reduces there on a CPU
SHARED_MEMORY = Path("/dev/shm")


def check_open_files() -> Iterator[Finding]:
    """Files that a process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    cure = f"ulimit -n {MIN_OPEN_FILES} before the start (in a container: --ulimit nofile={MIN_OPEN_FILES})"
    yield judge("open files", str(soft), cure, good=enough, otherwise="warn")


def check_shared_memory() -> Iterator[Finding]:
    """/dev/shm, which containers make 64 MB large."""
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        cure = "start the container with --shm-size=8g (or --ipc=host), or set data.num_workers to 0"
        yield judge("/dev/shm", f"{free / GIB:.1f} GiB free", cure, good=free >= MIN_SHARED_MEMORY, otherwise="warn")


def check_ranks() -> Iterator[Finding]:
    """What a launcher has set, if there is one, against the GPUs of this machine."""
    import torch

    yield from judge_ranks(os.environ, torch.cuda.device_count())


def judge_ranks(variables: Mapping[str, str], num_gpus: int) -> Iterator[Finding]:
    """The launcher's variables against `num_gpus` of this machine."""
    if "RANK" not in variables or "WORLD_SIZE" not in variables:
        yield Finding("ranks", "no launcher: one process")
        return
    rank, world_size = variables["RANK"], variables["WORLD_SIZE"]
    local = int(variables.get("LOCAL_RANK", "0"))
    yield Finding("ranks", f"rank {rank} of {world_size}, local rank {local}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if int(world_size) > 1 and missing:
        cure = "start with deepspeed or torchrun, which set them"
        yield Finding("launcher", f"{' and '.join(missing)} not set", "fail", cure)
    if num_gpus and local >= num_gpus:
        cure = f"start at most {num_gpus} ranks on this machine (--num_gpus, --nproc_per_node)"
        yield Finding("launcher", f"local rank {local} has no GPU: there are {num_gpus}", "fail", cure)


def check_folders() -> Iterator[Finding]:
    """Folders that every job writes: what DeepSpeed compiles, and the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        prepare_compiler()
        check_folder_writable(Path(os.environ["TORCH_EXTENSIONS_DIR"]), "TORCH_EXTENSIONS_DIR")
        yield Finding("TORCH_EXTENSIONS_DIR", os.environ["TORCH_EXTENSIONS_DIR"])
    except UserError as error:
        yield Finding("TORCH_EXTENSIONS_DIR", str(error), "fail", "set it to a folder of your own")
    try:
        check_folder_writable(Path(HF_HUB_CACHE), "HF_HOME")
        yield Finding("hub's cache", HF_HUB_CACHE)
    except UserError as error:
        yield Finding("hub's cache", str(error), "warn", "set HF_HOME to a folder of your own, if you download")
