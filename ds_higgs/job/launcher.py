"""The launcher above this process (deepspeed, torchrun, none): whether it is still there, and its command line."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from ds_higgs.job.processes import parent_of

_SCRIPTS = {"deepspeed", "deepspeed.pt", "torchrun"}
_MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
}


@dataclass(frozen=True)
class Launcher:
    """The chain of launcher processes above this one, as it was at the start.

    links: (process, parent) pairs from this process upwards; a link is broken when the process has another parent.
    command: the outermost launcher's command line, or this process's where there is none.
    """

    links: tuple[tuple[int, int], ...]
    command: tuple[str, ...]

    def is_lost(self) -> bool:
        """Whether a launcher is gone; its ranks then run on as orphans that nobody waits for."""
        try:
            return any(parent_of(process) != parent for process, parent in self.links)
        except OSError:  # out of file handles, say: nothing is known, and the launcher was there a moment ago
            return False

    def resume_command(self) -> str:
        """What to type to start the same job again."""
        return shlex.join(self.command)


def find_launcher() -> Launcher:
    """Look at the processes above this one; a shell or a scheduler is no launcher."""
    links = []
    command = (sys.executable, "-m", "ds_higgs", *sys.argv[1:])
    process, parent = os.getpid(), os.getppid()
    while _is_launcher(arguments := _command_line(parent)):
        links.append((process, parent))
        command = _without_interpreter(arguments)
        process, parent = parent, parent_of(parent)
    return Launcher(tuple(links), command)


def _is_launcher(arguments: tuple[str, ...]) -> bool:
    program = arguments[:4]  # interpreter, its flags, script or -m module
    return any(Path(argument).name in _SCRIPTS or argument in _MODULES for argument in program)


def _without_interpreter(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """`python /bin/deepspeed ...` is what a typed `deepspeed ...` becomes."""
    for index, argument in enumerate(arguments[:4]):
        if Path(argument).name in _SCRIPTS:
            return (Path(argument).name, *arguments[index + 1 :])
    return arguments


def _command_line(process: int) -> tuple[str, ...]:
    try:
        content = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # gone, or another user's
        return ()
    return tuple(os.fsdecode(argument) for argument in content.split(b"\0")[:-1])
