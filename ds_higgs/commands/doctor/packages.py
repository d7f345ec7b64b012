"""Doctor: the installed packages, as pyproject.toml pins them, and the classes that come out of them."""

import platform
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, requires, version

from ds_higgs.commands.doctor.finding import Finding, judge
from ds_higgs.errors import UserError
from ds_higgs.job.preflight import BOSON_PACKAGES, HOW_TO_INSTALL_BOSON, is_installed


def check_packages() -> Iterator[Finding]:
    """The versions that work together."""
    yield judge("Python", platform.python_version(), "install Python 3.10 or newer", good=sys.version_info >= (3, 10))
    try:
        requirements = requires("ds_higgs") or []
    except PackageNotFoundError:
        yield Finding("ds_higgs", "not installed", "fail", "pip install . in its folder")
        return
    for requirement in requirements:
        pinned = re.fullmatch(r"([\w-]+)==([\w.]+)", requirement)
        if pinned:
            name, wanted = pinned.groups()
            yield check_version(name, wanted, f"pip install {name}=={wanted}")
    for package in BOSON_PACKAGES:
        name, _, wanted = package.partition("==")
        yield check_version(name, wanted, HOW_TO_INSTALL_BOSON)


def check_version(name: str, wanted: str, cure: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "not installed", "fail", cure)
    return judge(name, found, cure, good=found == wanted)


def check_model() -> Iterator[Finding]:
    """The HiggsAudioModel that would be trained."""
    try:
        from ds_higgs.model.loading import HiggsAudioModel
        from ds_higgs.model.signature import check_model_class

        check_model_class(HiggsAudioModel, allow_fork=False)
    except UserError as error:
        yield Finding("HiggsAudioModel", str(error), "fail", HOW_TO_INSTALL_BOSON)
    except ImportError as error:
        yield Finding("HiggsAudioModel", f"cannot be imported: {error}", "fail", "mend the packages above")
    else:
        yield Finding("HiggsAudioModel", "boson_multimodal's own: no labels, no loss inside")


def check_codec_packages() -> Iterator[Finding]:
    """What the released audio tokenizer imports; and packages that break transformers beside a CPU build of torch."""
    import torch

    from ds_higgs.data.codec.higgs import import_tokenizer

    broken = [name for name in ("torchaudio", "torchvision") if PathFinder.find_spec(name) is not None]
    if broken and torch.version.cuda is None:
        for name in broken:
            yield Finding(name, "breaks transformers beside CPU torch", "fail", f"pip uninstall {name}")
        return
    try:
        import_tokenizer()
    except UserError as error:
        yield Finding("audio codec's packages", str(error), "fail", HOW_TO_INSTALL_BOSON)
    else:
        yield Finding("audio codec's packages", "installed")


def check_optional() -> Iterator[Finding]:
    """What makes training faster, smaller or followed elsewhere, where it is installed."""
    for module, purpose in (
        ("liger_kernel", "fused kernels (memory.kernels: liger)"),
        ("flash_attn", "memory.attention: flash_attention_2"),
        ("bitsandbytes", "4-bit base (model.quantization: nf4), optim.type: adamw_8bit"),
        ("wandb", "logging.wandb"),
        ("comet_ml", "logging.comet"),
    ):
        yield Finding(module, "installed" if is_installed(module) else f"not installed; optional, for {purpose}")
