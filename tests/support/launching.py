"""Start the real launchers as a user would, in processes of their own."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from tests.support.fork_server import run_forked
from tests.support.patience import HANG_S

ROOT = Path(__file__).parents[2]
# A launcher's variables, and the one that names the test that runs.
NOT_HANDED_ON = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "PYTEST_CURRENT_TEST"}
# Below those that the kernel hands out by itself (from 32768 on); each process of pytest-xdist has its own.
PORTS_OF_A_PROCESS = 2000
_first_port = 10_000 + PORTS_OF_A_PROCESS * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 11)
_offsets = cycle(range(PORTS_OF_A_PROCESS))


def free_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a new shell in the repository: no launcher's variables in it, one thread per process."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
    python_path = os.pathsep.join(path for path in (str(ROOT), kept.get("PYTHONPATH", "")) if path)
    scripts = str(Path(sys.executable).parent)
    return {
        **kept,
        "PYTHONPATH": python_path,
        "PATH": scripts + os.pathsep + kept["PATH"],
        "OMP_NUM_THREADS": "1",
        **(extra or {}),
    }


def run(
    command: Sequence[str | Path],
    *,
    timeout_s: float = HANG_S,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run a command, from the repository's root; its output is one text, standard error in it."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=free_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_ds_higgs(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command line, without a launcher, in a fork: for what a command does rather than how it starts."""
    words = ["-m", "ds_higgs", *(str(argument) for argument in arguments)]
    environment = free_environment()
    [status], output = run_forked([(words, environment)], cwd=cwd, environment=environment)
    return subprocess.CompletedProcess(words, status, output)


def run_ranks(ranks: int, *words: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A program (`FILE ...` or `-m MODULE ...`) as `ranks` ranks of one job, without a launcher, in forks."""
    environment = free_environment()
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    shared = {**environment, **job, **(env or {})}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    programs = [([str(word) for word in words], shared | variables) for variables in own]
    statuses, output = run_forked(programs, cwd=ROOT, environment=environment)
    return subprocess.CompletedProcess(words, next((status for status in statuses if status), 0), output)


def free_port() -> str:
    """A rendezvous port that nobody listens on, and that none of the last tests has had."""
    while True:
        port = _first_port + (os.getpid() + next(_offsets)) % PORTS_OF_A_PROCESS
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED:
                return str(port)


def deepspeed(ranks: int, *arguments: str | Path) -> list[str | Path]:
    """`deepspeed` on `ranks` processes of this machine."""
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", free_port(), *arguments]


def torchrun(ranks: int, *arguments: str | Path) -> list[str | Path]:
    """`torchrun` on `ranks` processes of this machine."""
    return ["torchrun", "--nproc_per_node", str(ranks), "--master_port", free_port(), *arguments]


def ds_higgs(*arguments: str | Path) -> list[str | Path]:
    """The command line without a launcher."""
    return [sys.executable, "-m", "ds_higgs", *arguments]
