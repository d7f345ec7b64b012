"""How a process ends: the status, what is still done, and that torch's threads cannot abort it."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest

from tests.support import launching

# gloo's thread has a tensor to let go of, and rank 0 ends before it yields Python's lock to that thread.
LEAVES_AT_ONCE = """
import sys, time
import torch, torch.distributed as dist
from ds_higgs.job.process_exit import run_and_exit

def main():
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    tensor = torch.ones(4)
    dist.all_reduce(tensor)
    if rank == 1:
        time.sleep(0.5)
    sys.kept = tensor
    dist.all_reduce(tensor, async_op=True)
    if rank == 1:
        time.sleep(2)
    sys.setswitchinterval(60)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        pass

"""


def run_python(code: str, *arguments: str) -> CompletedProcess[str]:
    return launching.run([sys.executable, "-c", code, *arguments])


@pytest.mark.costly
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("return None", 0),
        ("return 2", 2),
        ("sys.exit(3)", 3),
        ("sys.exit()", 0),
        ("sys.exit('wrong')", 1),
        ("raise ArithmeticError('wrong')", 1),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_status_and_output_are_those_of_a_usual_exit(body, status):
    done = run_python(
        "import atexit, sys, threading, time\n"
        "from ds_higgs.job.process_exit import run_and_exit\n"
        "def main():\n"
        "    atexit.register(print, 'exit function')\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        f"    {body}\n"
        "run_and_exit(main)\n"
    )
    assert done.returncode == status
    assert "thread\nexit function\n" in done.stdout
    assert ("wrong" in done.stdout) == ("wrong" in body)
    assert ("Traceback" in done.stdout) == ("ArithmeticError" in body)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(0.15, marks=pytest.mark.slow),
        0.5,
        pytest.param(1.5, marks=pytest.mark.slow),
        4,
    ],
)
def test_an_interrupt_at_any_moment_is_no_traceback(seconds, tmp_path):
    command = [sys.executable, "-m", "ds_higgs", "init-tiny", str(tmp_path / "base")]
    process = subprocess.Popen(
        command, env=launching.free_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output
    assert process.returncode in (130, -signal.SIGINT, 0), output


@pytest.mark.costly
@pytest.mark.parametrize(
    ("ending", "status"),
    [
        pytest.param("run_and_exit(main)", 0, id="run_and_exit"),
        pytest.param("main()", -6, id="as Python does", marks=pytest.mark.slow),
    ],
)
def test_a_collective_under_way_does_not_abort_the_process(tmp_path, ending, status):
    """The second case shows that the first one would fail without what it tests."""
    with ThreadPoolExecutor(2) as pool:
        ranks = pool.map(lambda rank: run_python(LEAVES_AT_ONCE + ending, rank, str(tmp_path / "store")), "01")
        done = next(ranks)
    assert done.returncode == status, done.stdout
