"""Doctor: GPUs, their driver against torch's wheel, and the compiler that DeepSpeed needs."""

import shutil
from collections.abc import Iterator

from ds_higgs.commands.doctor.finding import Finding, judge
from ds_higgs.job.devices import driver_problem, read_driver

OTHER_WHEEL = "install a torch wheel that fits the driver: rm -rf .venv && bash launch/install.sh .venv"


def check_gpus() -> Iterator[Finding]:
    """torch, the driver and every GPU."""
    import torch

    driver = read_driver()
    yield Finding("torch", torch.__version__)
    if driver is not None:
        yield compare_driver(driver, torch.version.cuda)
    elif torch.version.cuda is not None:
        yield Finding("NVIDIA driver", "none", "warn", "install the driver, or start the container with its GPUs")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        cure = "bf16 needs compute capability 8.0 or newer: set zero.precision to fp32"
        yield judge(f"GPU {index}", found, cure, good=properties.major >= 8)
    if torch.cuda.device_count() == 0:
        yield Finding("GPU", "none: training runs on the CPU, for trying things out")


def compare_driver(driver: str, cuda: str | None) -> Finding:
    """Whether a driver runs a torch that was built for CUDA `cuda` (None: for the CPU alone)."""
    if (problem := driver_problem(driver, cuda)) is not None:
        return Finding("NVIDIA driver", problem, "fail", OTHER_WHEEL)
    return Finding("NVIDIA driver", f"{driver}; torch's wheel is of CUDA {cuda}")


def check_compiler() -> Iterator[Finding]:
    """What torch.compile makes its kernels with on a GPU; nothing else is compiled."""
    path = shutil.which("g++")
    cure = "apt install g++, or set memory.compile to off"
    yield judge("g++", path or "not on PATH", cure, good=path is not None, otherwise="warn")
