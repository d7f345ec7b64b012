"""CUDA_VISIBLE_DEVICES reaches the ranks of every script in launch/, whatever it names."""

import re
import shutil
from pathlib import Path

import pytest

from tests.support import launching

LAUNCH = launching.ROOT / "launch"
NVIDIA_SMI = 'for n in 0 1 2 3 4 5 6 7; do echo "$n, GPU-00$n-abc"; done'
SHOW = 'echo "$(basename $0) $*" visible=${CUDA_VISIBLE_DEVICES-unset} accelerator=${DS_ACCELERATOR-unset}'


@pytest.fixture
def programs(tmp_path) -> Path:
    """A folder of programs that say how they were called, and an nvidia-smi of eight GPUs."""
    for name, body in (("nvidia-smi", NVIDIA_SMI), ("deepspeed", SHOW), ("torchrun", SHOW)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(script: str, programs: Path, **env: str):
    path = launching.free_environment()["PATH"]
    return launching.run(["bash", LAUNCH / script, "-c", "x.yaml"], env={"PATH": f"{programs}:{path}", **env})


@pytest.mark.parametrize(
    ("script", "visible", "expected"),
    [
        ("train_1gpu.sh", "3", "--include localhost:3 --master_port 29500 --module ds_higgs train -c x.yaml"),
        ("train_1gpu.sh", "5,2", "--include localhost:5 "),
        ("train_1gpu.sh", "GPU-006", "--include localhost:6 "),
        ("train_8xh200.sh", "7,6,5,4,3,2,1,0", "--include localhost:7,6,5,4,3,2,1,0 "),
    ],
)
def test_the_gpus_that_are_named_are_taken(programs, script, visible, expected):
    done = start(script, programs, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(f"deepspeed --log_level error {expected}")
    assert "visible=unset" in done.stdout


@pytest.mark.parametrize(("script", "visible"), [("train_8xh200.sh", "0,1"), ("train_1gpu.sh", "MIG-1")])
def test_gpus_that_are_not_there_are_refused(programs, script, visible):
    done = start(script, programs, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 2
    assert re.match(r"CUDA_VISIBLE_DEVICES.*expected", done.stdout)


def test_no_gpu_is_the_cpu(programs):
    done = start("train_1gpu.sh", programs, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.startswith("deepspeed --log_level error --num_gpus 1 ")
    assert "accelerator=cpu" in done.stdout


def test_several_machines_leave_it_to_torchrun(programs):
    machines = {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0", "GPUS_PER_NODE": "1"}
    done = start("train_multinode.sh", programs, CUDA_VISIBLE_DEVICES="3", **machines)
    assert "visible=3" in done.stdout


def test_no_script_goes_round_it():
    calls = [path.name for path in LAUNCH.iterdir() if re.search(r"^(exec )?deepspeed ", path.read_text(), re.M)]
    assert calls == ["on_gpus.sh"]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "visible"), [("train_1gpu.sh", "3"), ("train_8xh200.sh", "8,9,10,11,12,13,14,15")])
def test_the_real_launcher_sets_it_for_its_ranks(programs, script, visible):
    """As its own log says; on a CPU, where LOCAL_SIZE stands for sixteen GPUs."""
    (programs / "deepspeed").unlink()
    env = {"LOCAL_SIZE": "16", "CUDA_VISIBLE_DEVICES": visible, "LAUNCHER_LOG_LEVEL": "info"}
    done = launching.run(
        ["bash", LAUNCH / script, "--help"],
        env={"PATH": f"{programs}:{launching.free_environment()['PATH']}", "MASTER_PORT": launching.free_port(), **env},
    )
    assert done.returncode == 0, done.stdout
    assert f"Setting CUDA_VISIBLE_DEVICES={visible}\n" in done.stdout


@pytest.fixture
def suite(tmp_path) -> Path:
    """A copy of test.sh whose environments are there at once, and whose pytest says how it was called."""
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "test.sh", tmp_path / "launch")
    for script in ("install.sh", "install_native.sh"):
        made = 'mkdir -p "$1/bin"; touch "$1/.installed"'
        (tmp_path / "launch" / script).write_text(f'echo "{script} $*"; {made}\n')
    python = tmp_path / ".venv-test" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$* native=${DS_HIGGS_NATIVE_PYTHON-unset}"\n')
    python.chmod(0o755)
    return tmp_path


def test_the_native_environment_is_made_on_demand_and_then_used(suite):
    def run(*arguments: str) -> list[str]:
        path = launching.free_environment()["PATH"]
        done = launching.run(["bash", suite / "launch" / "test.sh", *arguments], env={"PATH": path})
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()

    said = run("-k", "x")
    assert (len(said), said[-1].endswith("-q -k x native=unset")) == (2, True)
    of_native = f"native={suite}/.venv-native/bin/python"
    said = run("--native", "-k", "x")
    assert said[1:] == ["install_native.sh .venv-native", said[2]]
    assert said[2].endswith(f"-q tests/native -k x {of_native}")
    assert run("--fast")[-1].endswith(f"-q --fast {of_native}")
