"""What is installed: the wheel is whole, torch's build fits the driver, and what cannot be declared is named."""

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from ds_higgs.job.preflight import BOSON_PACKAGES, HOW_TO_INSTALL_BOSON
from tests.support import launching
from tests.support.launching import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_pip("wheel", "--no-build-isolation", "-w", folder, copy(folder))
    [wheel] = folder.glob("*.whl")
    return wheel


def run_pip(command: str, *arguments: str | Path) -> None:
    done = launching.run([sys.executable, "-m", "pip", command, "-q", "--no-deps", *arguments])
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_wheel_holds_every_file_of_the_package_and_the_licence(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "ds_higgs").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= packed
    assert any(name.endswith("LICENSE") for name in packed)


def copy(folder: Path) -> Path:
    """The files that a wheel is built from, away from the checkout: setuptools writes beside them."""
    source = folder / "source"
    shutil.copytree(ROOT / "ds_higgs", source / "ds_higgs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ("580.65.06", "torch==2.13.0"),
        ("550.54.15", "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"),
        ("470.10", None),
        (None, "torch==2.13.0"),
    ],
)
def test_torch_fits_the_driver(tmp_path, driver, expected):
    if driver is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    done = launching.run(["bash", "launch/choose_torch.sh"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == (0 if expected else 1)
    assert done.stdout.strip() == expected if expected else "525 or newer expected" in done.stdout


def test_without_bosons_package_the_first_command_names_the_one_that_installs_it(tmp_path):
    (tmp_path / "boson_multimodal.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'boson_multimodal'\", name='boson_multimodal')"
    )
    done = launching.run(launching.ds_higgs("init-tiny", tmp_path / "base"), env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert (done.returncode, "Traceback" in done.stdout) == (2, False), done.stdout
    assert HOW_TO_INSTALL_BOSON in done.stdout


@pytest.fixture(scope="module")
def project() -> dict:
    """pyproject.toml."""
    return pytest.importorskip("tomllib", reason="of Python 3.11").loads((ROOT / "pyproject.toml").read_text())


def test_uv_installs_the_same_packages_without_what_they_declare(project):
    assert tuple(project["dependency-groups"]["boson"]) == BOSON_PACKAGES
    told = [dict(one) for one in project["tool"]["uv"]["dependency-metadata"]]
    assert [f"{one['name']}=={one['version']}" for one in told] == [*BOSON_PACKAGES]
    assert all(one["requires-dist"] == [] for one in told)


@pytest.mark.slow
def test_uv_brings_all_by_one_command_and_nothing_that_breaks_it(tmp_path):
    """It asks the package index, and installs nothing."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    [command] = re.findall(r"uv pip install [^`\n]*", (ROOT / "README.md").read_text())
    words = [word for word in command.split() if not word.startswith("--torch-backend")]  # which asks another index
    launching.run(["uv", "venv", "--python", sys.executable, tmp_path])
    done = launching.run([*words, "--dry-run"], env={"VIRTUAL_ENV": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-4000:]
    installed = dict(re.findall(r"^ \+ ([\w-]+)==(\S+)", done.stdout, flags=re.MULTILINE))
    assert (installed["torch"].partition("+")[0], installed["transformers"]) == ("2.13.0", "4.46.3")
    assert {package.partition("==")[0] for package in BOSON_PACKAGES} <= installed.keys()
    assert not {"torchaudio", "torchvision"} & installed.keys()


def test_one_list_of_packages_and_files_that_exist():
    script = (ROOT / "launch" / "install.sh").read_text()
    assert " ".join(BOSON_PACKAGES) in script
    docker = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", docker, flags=re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    assert all((ROOT / name).exists() for name in re.findall(r"bash (\S+\.sh)", docker))
    assert (ROOT / "LICENSE").read_text().strip().startswith("Apache License")
