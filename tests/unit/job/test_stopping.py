"""Stop requests: signals leave a note, a second SIGINT ends the process, a lost launcher counts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ds_higgs.job.launcher import Launcher, find_launcher
from ds_higgs.job.stopping import STOP_SIGNALS, Stopped, StopRequests
from tests.support.patience import HANG_S

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_leaves_a_note(number):
    usual = signal.getsignal(number)
    with StopRequests() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is usual


def test_a_hang_up_that_nohup_ignores_is_no_request():
    program = (
        "import os, signal; from ds_higgs.job.stopping import StopRequests\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with StopRequests() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP); print(stop.requested())"
    )
    output, errors = run_python(program).communicate(timeout=60)
    assert output == "False\n", errors


def test_output_without_a_reader_is_dropped():
    program = (
        "import os, sys; from ds_higgs.job.lossy_output import lossy_output\n"
        "reader, writer = os.pipe(); os.dup2(writer, 1); os.close(reader); os.close(writer)\n"
        "with lossy_output():\n"
        "    print('nobody reads this', flush=True); print('nor this', flush=True)\n"
        "    sys.stdout.flush(); print('through', file=sys.stderr)\n"
        "os._exit(0)"
    )
    process = run_python(program)
    _, errors = process.communicate(timeout=60)
    assert errors == "through\n"
    assert process.returncode == 0


def test_a_stop_that_all_ranks_agree_on_is_final():
    with StopRequests() as stop:
        stop.stop_here()
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.is_agreed, "the other ranks do not know yet"
        assert stop.agreed()
        with pytest.raises(Stopped):
            stop.stop_here()


def test_the_first_reason_is_kept():
    with StopRequests(lambda: True) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    assert stop.reason == "SIGUSR1"


def test_a_lost_launcher_is_a_request():
    lost = [False]
    with StopRequests(lambda: lost[0]) as stop:
        assert not stop.requested()
        lost[0] = True
        assert stop.requested()
        assert stop.reason == "the launcher is gone"


def run_python(program: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_interrupts_stop_at_once():
    program = (
        "import time; from ds_higgs.job.stopping import StopRequests\n"
        "with StopRequests() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.requested(): time.sleep(0.01)\n"
        "    print('noted', flush=True); time.sleep(60)"
    )
    process = run_python(program)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=HANG_S) == 130
    assert "without saving" in process.stderr.read()


def test_no_launcher_is_never_lost():
    launcher = find_launcher()
    assert launcher.links == ()
    assert not launcher.is_lost()
    assert "-m ds_higgs" in launcher.resume_command()


CHILD = "import sys, time; from ds_higgs.job.launcher import find_launcher\nlauncher = find_launcher()\n" + (
    "print(len(launcher.links), launcher.resume_command(), flush=True)\n"
    "while not launcher.is_lost(): time.sleep(0.02)\n"
    "print('lost', flush=True)\n"
)


@pytest.mark.parametrize("victim", ["outer", "inner"])
def test_the_loss_of_either_launcher_process_is_seen(tmp_path, victim):
    """A stand-in for `deepspeed`, which starts its `launch` child, which starts the ranks."""
    outer, inner = tmp_path / "deepspeed", tmp_path / "torchrun"
    start = "import subprocess, sys, time\np = subprocess.Popen([sys.executable, {0!r}, *sys.argv[1:]])\n"
    (tmp_path / "child.py").write_text(CHILD)
    outer.write_text(start.format(str(inner)) + "p.wait()\ntime.sleep(60)")
    inner.write_text(
        start.format(str(tmp_path / "child.py")) + "print('inner', flush=True)\nimport os\n"
        "print(os.getpid(), flush=True)\np.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, str(outer), "--num_gpus", "2"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline().strip() for _ in range(3)]
    assert "2 deepspeed --num_gpus 2" in lines
    inner_id = next(int(line) for line in lines if line.isdigit())
    os.kill(process.pid if victim == "outer" else inner_id, signal.SIGKILL)
    assert process.stdout.readline().strip() == "lost"
    process.kill()


def test_a_broken_link_is_a_lost_launcher():
    assert not Launcher(((os.getpid(), os.getppid()),), ()).is_lost()
    assert Launcher(((os.getpid(), 1 << 30),), ()).is_lost()


def test_without_file_handles_the_launcher_is_not_lost():
    program = (
        "import os, resource; from ds_higgs.job.launcher import Launcher\n"
        "parent = os.getppid(); grandparent = int(open(f'/proc/{parent}/stat').read().rpartition(')')[2].split()[1])\n"
        "launcher = Launcher(((os.getpid(), parent), (parent, grandparent)), ())\n"
        "print(launcher.is_lost())\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "print(launcher.is_lost())"
    )
    output, errors = run_python(program).communicate(timeout=HANG_S)
    assert output == "False\nFalse\n", errors
