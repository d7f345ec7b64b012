"""Whether this process computes on a GPU: where torch can use one, and the CPU was not asked for."""

import os
import re
from pathlib import Path

import torch

from ds_higgs.errors import UserError

DRIVER_FILE = Path("/proc/driver/nvidia/version")
DEVICE_FOLDER = Path("/dev")
# CUDA's release notes: the oldest Linux driver that runs programs of a CUDA major version.
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def uses_cuda() -> bool:
    """Whether a GPU can be used and is to be."""
    return not cpu_asked_for() and torch.cuda.is_available()


def cpu_asked_for() -> bool:
    """Whether DS_ACCELERATOR or a CUDA_VISIBLE_DEVICES that names nothing says so."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return os.environ.get("DS_ACCELERATOR") == "cpu" or (visible is not None and visible.strip() in ("", "-1"))


def check_gpu_is_used() -> None:
    """Check that training would not go to the CPU unasked, beside a GPU that torch cannot use.

    Raises:
        UserError: saying why torch cannot, as far as driver and wheel tell.
    """
    driver = read_driver()
    if uses_cuda() or cpu_asked_for() or driver is None or not has_gpu():
        return
    why = driver_problem(driver, torch.version.cuda) or f"torch.cuda finds none (driver {driver})"
    raise UserError(
        f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use: {why}; expected a torch wheel that "
        "fits the driver (rm -rf .venv && bash launch/install.sh .venv), or DS_ACCELERATOR=cpu to train on the CPU"
    )


def has_gpu() -> bool:
    """Whether a GPU was given to this machine or container: a container may see the driver of its host without one."""
    return any(re.fullmatch(r"nvidia\d+", device.name) for device in DEVICE_FOLDER.glob("nvidia*"))


def read_driver() -> str | None:
    """The version of the NVIDIA driver that the kernel has loaded; None without one."""
    try:
        text = DRIVER_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
    return found.group(1) if found else None


def driver_problem(driver: str, cuda: str | None) -> str | None:
    """Why a driver cannot run a torch that was built for CUDA `cuda` (None: for the CPU alone); None where it can."""
    if cuda is None:
        return f"driver {driver}, but torch is built for the CPU alone"
    oldest = OLDEST_DRIVERS.get(int(cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) >= oldest:
        return None
    return f"driver {driver}, but torch's wheel is of CUDA {cuda}, which needs {oldest} or newer"


def prepare_allocator() -> None:
    """Let CUDA's allocator grow its segments, unless the user has chosen otherwise; before the first allocation.

    Micro-batches differ in length from step to step, which fragments segments of fixed sizes.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        old_name = torch.__version__ < "2.10"
        os.environ[ALLOCATOR_VARIABLES[old_name]] = "expandable_segments:True"
