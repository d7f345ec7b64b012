"""`ds-higgs doctor`: whether this environment can train, and what to do where it cannot."""

import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from rich.console import Console
from rich.table import Table

from ds_higgs.errors import UserError
from ds_higgs.job.preflight import is_installed

BOSON = ("boson-multimodal", "0.1.1", "pip install --no-deps boson-multimodal==0.1.1")


@dataclass(frozen=True)
class Finding:
    """One line of the report. remedy: what to do, where `ok` is False."""

    what: str
    found: str
    ok: bool = True
    remedy: str = ""


def run_doctor() -> None:
    """Print what was found.

    Raises:
        UserError: listing what has to be mended before training can work.
    """
    findings = [finding for check in CHECKS for finding in check()]
    table = Table("", "what", "found", "remedy", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(
            "ok" if finding.ok else "WRONG", finding.what, finding.found, "" if finding.ok else finding.remedy
        )
    Console().print(table)
    wrong = [f"{finding.what}: {finding.found}; {finding.remedy}" for finding in findings if not finding.ok]
    if wrong:
        raise UserError.from_problems("this environment cannot train yet", wrong)


def check_packages() -> Iterator[Finding]:
    """The versions that work together, as pyproject.toml pins them."""
    yield Finding("Python", platform.python_version(), sys.version_info >= (3, 10), "install Python 3.10 or newer")
    try:
        requirements = requires("ds_higgs") or []
    except PackageNotFoundError:
        yield Finding("ds_higgs", "not installed", False, "pip install -e . in its folder")
        return
    for requirement in requirements:
        pinned = re.fullmatch(r"([\w-]+)==([\w.]+)", requirement)
        if pinned:
            name, wanted = pinned.groups()
            yield check_version(name, wanted, f"pip install {name}=={wanted}")
    yield check_version(*BOSON)


def check_version(name: str, wanted: str, remedy: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "not installed", False, remedy)
    return Finding(name, found, found == wanted, "" if found == wanted else remedy)


def check_torch() -> Iterator[Finding]:
    """torch, its devices, and packages that break it on a CPU."""
    import torch

    yield Finding("torch", torch.__version__)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = properties.major >= 8
        remedy = "" if bf16 else "bf16 needs compute capability 8.0 or newer: set zero.precision to fp32"
        yield Finding(f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", bf16, remedy)
    if not torch.cuda.is_available():
        yield Finding("GPU", "none: training runs on the CPU, for trying things out")
        for name in ("torchaudio", "torchvision"):
            if importlib.util.find_spec(name) is not None:
                yield Finding(name, "breaks transformers beside CPU torch", False, f"pip uninstall {name}")


def check_compiler() -> Iterator[Finding]:
    """DeepSpeed compiles a small extension when training starts."""
    for program, remedy in (("g++", "apt install g++"), ("ninja", "pip install ninja")):
        path = shutil.which(program)
        yield Finding(program, path or "not on PATH", path is not None, "" if path else remedy)


def check_model() -> Iterator[Finding]:
    """The HiggsAudioModel that would be trained."""
    try:
        from ds_higgs.model.loading import HiggsAudioModel
        from ds_higgs.model.signature import check_model_class

        check_model_class(HiggsAudioModel, allow_fork=False)
    except UserError as error:
        yield Finding("HiggsAudioModel", str(error), False, BOSON[2])
    except ImportError as error:
        yield Finding("HiggsAudioModel", f"cannot be imported: {error}", False, "mend the packages above")
    else:
        yield Finding("HiggsAudioModel", "boson_multimodal's own: no labels, no loss inside")


def check_optional() -> Iterator[Finding]:
    """What makes training faster, smaller or followed elsewhere, where it is installed."""
    for module, purpose in (
        ("liger_kernel", "fused kernels (memory.kernels: liger)"),
        ("flash_attn", "memory.attention: flash_attention_2"),
        ("bitsandbytes", "4-bit base (model.quantization: nf4)"),
        ("wandb", "logging.wandb"),
        ("comet_ml", "logging.comet"),
    ):
        there = is_installed(module)
        yield Finding(module, "installed" if there else f"not installed; optional, for {purpose}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_packages,
    check_torch,
    check_compiler,
    check_model,
    check_optional,
)
