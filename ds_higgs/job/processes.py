"""Other processes of this machine as /proc shows them: alive, stopped or gone, and whose children they are."""

import os
from pathlib import Path


class OtherProcess:
    """A process that is watched through its open `stat` file.

    So looking at it needs no file handle, which this process may have run out of, and a later process with the same
    number is not taken for it. What cannot be read says nothing: only the kernel's word makes a process dead.
    """

    def __init__(self, number: int):
        self.number = number
        try:
            self._stat = os.open(f"/proc/{number}/stat", os.O_RDONLY)
        except FileNotFoundError:
            self._stat = -1

    def is_dead(self) -> bool:
        return self._state() in "ZX"

    def is_stopped(self) -> bool:
        """Whether it was halted (SIGSTOP), and can be continued."""
        return self._state() == "T"

    def _state(self) -> str:
        if self._stat == -1:
            return "X"
        try:
            return read_stat(os.pread(self._stat, 4096, 0))[0]
        except ProcessLookupError:
            return "X"


def process_space() -> str:
    """Where a process number means the same process: this boot of this machine, and this container on it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def parent_of(process: int) -> int:
    """The parent's number, 0 where the process is gone.

    Raises:
        OSError: it cannot be told, for example without a free file handle.
    """
    if process == os.getpid():
        return os.getppid()
    try:
        state, parent = read_stat(Path(f"/proc/{process}/stat").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else parent


def read_stat(content: bytes) -> tuple[str, int]:
    """State and parent from a `stat` file, whose second field, the name in parentheses, may hold spaces."""
    state, parent = content.rpartition(b")")[2].split()[:2]
    return state.decode(), int(parent)
