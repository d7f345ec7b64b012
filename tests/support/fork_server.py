"""Runs Python programs in forks of a process that has imported what they import, which takes seconds each time.

For tests of what a program does. Tests of how it is started use the real launchers and new interpreters.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

from tests.support.patience import HANG_S

PRELOADED = ("ds_higgs.training.run", "ds_higgs.commands.validate", "ds_higgs.commands.export", "ds_higgs.report.page")


class ForkServer:
    """The client's end: one server for each process that asks."""

    def __init__(self, environment: Mapping[str, str]):
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,
        )
        atexit.register(self._end)

    def run(self, programs: Sequence[tuple[Sequence[str], Mapping[str, str]]], *, cwd: Path, output: Path) -> list[int]:
        """Run programs side by side to their ends; the exit status of each, minus the signal where one ended it.

        Args:
            programs: each its words (`-m MODULE ...` or `FILE ...`) and its environment.
            output: where all of them write.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "programs": [(list(words), dict(environment)) for words, environment in programs],
            "cwd": str(cwd),
            "output": str(output),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], HANG_S)
        if not ready:
            self._end()
            raise TimeoutError(f"{programs[0][0]}: not ended in {HANG_S:g} s:\n{output.read_text(errors='replace')}")
        return json.loads(self._process.stdout.readline())

    def _end(self) -> None:
        """Kill the server with all that it has forked."""
        fork_server.cache_clear()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@cache
def fork_server(environment: tuple[tuple[str, str], ...]) -> ForkServer:
    """The server of this process; it is started when it is first asked for."""
    return ForkServer(dict(environment))


def run_forked(
    programs: Sequence[tuple[Sequence[str], Mapping[str, str]]], *, cwd: Path, environment: Mapping[str, str]
) -> tuple[list[int], str]:
    """Exit statuses of programs that run side by side, and what they wrote, as one text.

    Args:
        environment: of the server, the same at every call of a process.
    """
    with tempfile.NamedTemporaryFile(prefix="forked_", suffix=".log") as output:
        server = fork_server(tuple(sorted(environment.items())))
        statuses = server.run(programs, cwd=cwd, output=Path(output.name))
        return statuses, Path(output.name).read_text(encoding="utf-8", errors="replace")


def _serve() -> None:
    """Answer requests from standard input until it ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports say is no reply
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # what is imported is no garbage: the forks need not look through it
    for line in sys.stdin:
        request = json.loads(line)
        children = [
            _fork(words, environment, cwd=request["cwd"], output=request["output"])
            for words, environment in request["programs"]
        ]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        replies.write(json.dumps(statuses) + "\n")
        replies.flush()


def _fork(words: Sequence[str], environment: Mapping[str, str], *, cwd: str, output: str) -> int:
    child = os.fork()
    if child == 0:
        _become(words, environment, cwd=cwd, output=output)
    return child


def _become(words: Sequence[str], environment: Mapping[str, str], *, cwd: str, output: str) -> NoReturn:
    """Turn this fork into the program."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        written = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(written, 1)
        os.dup2(written, 2)
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
