"""Doctor: GPUs, their driver against torch's wheel, and the compiler that DeepSpeed needs."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ds_higgs.commands.doctor.finding import Finding, judge

DRIVER_FILE = Path("/proc/driver/nvidia/version")
# CUDA's release notes: the oldest Linux driver that runs programs of a CUDA major version.
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
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


def read_driver() -> str | None:
    """The version of the NVIDIA driver that the kernel has loaded; None without one."""
    try:
        text = DRIVER_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
    return found.group(1) if found else None


def compare_driver(driver: str, cuda: str | None) -> Finding:
    """Whether a driver runs a torch that was built for CUDA `cuda` (None: for the CPU alone)."""
    if cuda is None:
        return Finding("NVIDIA driver", f"{driver}, but torch is built for the CPU alone", "fail", OTHER_WHEEL)
    oldest = OLDEST_DRIVERS.get(int(cuda.partition(".")[0]), 0)
    found = f"{driver}; torch's wheel is of CUDA {cuda}" + (f", which needs {oldest} or newer" if oldest else "")
    return judge("NVIDIA driver", found, OTHER_WHEEL, good=int(driver.partition(".")[0]) >= oldest)


def check_compiler() -> Iterator[Finding]:
    """What torch.compile makes its kernels with on a GPU; nothing else is compiled."""
    path = shutil.which("g++")
    cure = "apt install g++, or set memory.compile to off"
    yield judge("g++", path or "not on PATH", cure, good=path is not None, otherwise="warn")
