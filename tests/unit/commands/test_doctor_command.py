"""`ds-higgs doctor -c CONFIG`, the whole command: an environment with one fault has one line on it, with its cure."""

import json
import resource
import shutil
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from ds_higgs import hub
from ds_higgs.cli.main import main
from ds_higgs.commands.doctor import job, limits, machine, packages

pytestmark = pytest.mark.costly
Usage = namedtuple("Usage", "total used free")


class Environment:
    """Where one fault is planted: switches of this process, a base, flags of the command."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, base: Path):
        self.patch, self.folder, self.base = patch, folder, base
        self.flags: list[str] = []

    def broken_copy(self, name: str, found: str, instead: str) -> None:
        """The base with another text in one of its files."""
        copy = self.folder / "broken"
        shutil.copytree(self.base, copy)
        (copy / name).write_text((copy / name).read_text().replace(found, instead))
        self.flags += ["--model.base", str(copy)]

    def a_file(self) -> Path:
        (self.folder / "file").write_text("")
        return self.folder / "file"


def no_compiler(place: Environment) -> None:
    place.patch.setattr(machine.shutil, "which", lambda program: None if program == "g++" else program)


def other_version(place: Environment) -> None:
    place.patch.setattr(packages, "version", lambda name: "0.0" if name == "peft" else version(name))


def missing_package(place: Environment) -> None:
    def look(name: str) -> str:
        if name == "descript-audiotools":
            raise PackageNotFoundError
        return version(name)

    place.patch.setattr(packages, "version", look)


def torchaudio(place: Environment) -> None:
    place.patch.setattr("torch.version.cuda", None)
    real = packages.PathFinder.find_spec
    planted = "torchaudio"
    place.patch.setattr(
        packages.PathFinder,
        "find_spec",
        lambda name, *rest: name if name == planted and not rest else real(name, *rest),
    )


def old_driver(place: Environment) -> None:
    place.patch.setattr(machine, "read_driver", lambda: "550.54.15")
    place.patch.setattr("torch.version.cuda", "13.0")


def few_files(place: Environment) -> None:
    place.patch.setattr(resource, "getrlimit", lambda _: (1024, 4096))


def small_shared_memory(place: Environment) -> None:
    real = shutil.disk_usage
    small = Usage(2**26, 0, 2**26)
    place.patch.setattr(limits.shutil, "disk_usage", lambda path: small if "shm" in str(path) else real(path))


def lonely_rank(place: Environment) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        place.patch.setenv(name, value)
    place.patch.delenv("MASTER_ADDR", raising=False)


def no_extensions(place: Environment) -> None:
    place.patch.setenv("TORCH_EXTENSIONS_DIR", str(place.a_file() / "extensions"))


def no_hub(place: Environment) -> None:
    place.patch.setenv("HF_HUB_OFFLINE", "1")
    place.patch.setattr(hub, "find_downloaded", lambda *_, **__: None)
    place.patch.setattr(hub.HfApi, "model_info", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    place.flags += ["--model.base", hub.RELEASED_REPOSITORY]


def no_run_folder(place: Environment) -> None:
    place.flags += ["--run.output_dir", str(place.a_file() / "run")]


def full_disk(place: Environment) -> None:
    real = shutil.disk_usage
    full = Usage(2**20, 0, 2**20)
    place.patch.setattr(job.shutil, "disk_usage", lambda path: real(path) if "shm" in str(path) else full)


def full_memory(place: Environment) -> None:
    place.patch.setattr(job, "_free_memory", lambda _: 2**20)


def broken_codec(place: Environment) -> None:
    place.broken_copy("codec/config.json", '"hidden_size": 32', '"hidden_size": "x"')


def other_weights(place: Environment) -> None:
    place.broken_copy("config.json", '"intermediate_size": 256', '"intermediate_size": 128')


def no_tracker(place: Environment) -> None:
    place.flags += ["--logging.comet", "project"]


# Each fault, the line that names it, and a part of its cure.
FAULTS = [
    (no_compiler, "g++", "apt install g++"),
    (other_version, "peft", "pip install peft=="),
    (missing_package, "descript-audiotools", "pip install --no-deps"),
    (torchaudio, "torchaudio", "pip uninstall torchaudio"),
    (old_driver, "NVIDIA driver", "launch/install.sh"),
    (few_files, "open files", "ulimit -n"),
    (small_shared_memory, "/dev/shm", "--shm-size"),
    (lonely_rank, "launcher", "deepspeed or torchrun"),
    (no_extensions, "TORCH_EXTENSIONS_DIR", "folder of your own"),
    (no_hub, hub.RELEASED_REPOSITORY, "ds-higgs download"),
    (no_run_folder, "run.output_dir", "change run.output_dir"),
    (full_disk, "disk of run.output_dir", "checkpoint.keep_latest"),
    (full_memory, "memory", "data.batch_size"),
    (broken_codec, "audio codec", "ds-higgs download"),
    (other_weights, "weights", "ds-higgs download"),
    (no_tracker, "trackers", "as it says"),
]
CONSEQUENCES = {no_hub: {hub.HIGGS_TOKENIZER}}  # where the base is not there, its codec is not either


@pytest.mark.parametrize(("fault", "what", "cure"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_planted_fault_is_named_with_its_cure(
    fault, what, cure, tiny_base, example_dir, tmp_path, monkeypatch, capsys
):
    assert len(FAULTS) >= 12
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("PATH", f"{packages.sys.prefix}/bin:/usr/bin:/bin")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**20, 2**20))
    place = Environment(monkeypatch, tmp_path, tiny_base)
    places = ["--base_ckpt", str(tiny_base), "--output_dir", str(tmp_path / "run")]
    fault(place)
    flags = ["--train_manifest", str(example_dir / "train.json"), *places, *place.flags]
    status = main(["doctor", "--json", *flags])
    told = capsys.readouterr()
    wrong = {one["what"]: one for one in json.loads(told.out)["findings"] if one["level"] != "ok"}
    assert set(wrong) - CONSEQUENCES.get(fault, set()) == {what}
    assert cure in wrong[what]["cure"]
    assert (status, what in told.err) == ((2, True) if wrong[what]["level"] == "fail" else (0, False))
