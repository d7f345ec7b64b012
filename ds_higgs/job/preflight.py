"""What a command needs to be able to write and to import: found out before anything is read, loaded or encoded."""

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_higgs.errors import UserError

# What they declare would replace torch and break transformers, so no dependency of ours can bring them.
BOSON_PACKAGES = ("boson-multimodal==0.1.1", "descript-audio-codec==1.0.0", "descript-audiotools==0.7.2")
HOW_TO_INSTALL_BOSON = "pip install --no-deps " + " ".join(BOSON_PACKAGES)
_BROUGHT_BY_THEM = ("boson_multimodal", "dac", "audiotools")

# DeepSpeed's section of a tracker, and the package that it imports once the model is loaded.
TRACKER_PACKAGES = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}


def check_folder_writable(folder: Path, key: str) -> None:
    """Check that `folder` can be written, or made where it is missing; nothing is left behind.

    Args:
        key: of the configuration or the command line, for messages.

    Raises:
        UserError: it or a folder above it is a file, or cannot be written.
    """
    try:
        nearest = _nearest_existing(folder)
        if nearest.is_dir():
            with tempfile.TemporaryFile(dir=nearest):
                return
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{key}: {folder} cannot be written: {_reason(error)}") from error
    raise UserError(f"{key}: found the file {nearest}, expected a folder" + (f" {folder}" if nearest != folder else ""))


def check_file_writable(file: Path, key: str) -> None:
    """The same of a file; one that exists would be written anew.

    Raises:
        UserError: as `check_folder_writable`, or `file` is a folder.
    """
    try:
        there = _nearest_existing(file) == file
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be written: {_reason(error)}") from error
    if not there:
        check_folder_writable(file.parent, key)
    elif file.is_dir():
        raise UserError(f"{key}: found the folder {file}, expected a file's name")
    elif not os.access(file, os.W_OK):
        raise UserError(f"{key}: {file} cannot be written")


def check_trackers(deepspeed_config: Mapping[str, Any]) -> None:
    """Check that the packages of the trackers that are switched on are installed.

    Raises:
        UserError: listing those that are not.
    """
    missing = [
        f"{section}: the package {package} is not installed (pip install {package})"
        for section, package in TRACKER_PACKAGES.items()
        if deepspeed_config.get(section, {}).get("enabled") and not is_installed(package)
    ]
    if missing:
        raise UserError.from_problems("a tracker cannot be used; leave its key in `logging` out, or:", missing)


def explain_missing(error: ModuleNotFoundError) -> UserError | None:
    """What to install where an import failed because of BOSON_PACKAGES; None for any other module."""
    module = (error.name or "").partition(".")[0]
    if module not in _BROUGHT_BY_THEM:
        return None
    return UserError(f"the package of {module} is not installed; to complete this installation: {HOW_TO_INSTALL_BOSON}")


def is_installed(package: str) -> bool:
    """Whether `package` can be imported; a mere folder of that name, such as the one wandb writes, cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def lacks_for_bitsandbytes(device_type: str) -> list[str]:
    """What is in the way of bitsandbytes' kernels on a device, a line each."""
    problems = []
    if device_type != "cuda":
        problems.append(f"it needs a CUDA device, found {device_type}")
    if not is_installed("bitsandbytes"):
        problems.append("the package bitsandbytes is not installed (pip install bitsandbytes)")
    return problems


def _nearest_existing(path: Path) -> Path:
    for candidate in (path, *path.absolute().parents):
        try:
            candidate.stat()
            return candidate
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise FileNotFoundError(path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
