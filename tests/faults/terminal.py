"""A terminal that a job runs in and that can hang up, as when a connection is lost."""

import fcntl
import os
import pty
import select
import subprocess
import termios
import threading
from pathlib import Path
from typing import Any


class Terminal:
    """Copies what is written to it into `log` until it hangs up."""

    def __init__(self, log: Path):
        self._ours, self._jobs = pty.openpty()
        self._log = log
        self._hung_up = threading.Event()
        self._copier = threading.Thread(target=self._copy, daemon=True)

    def start(self, command: list[str], start: Any, **options: Any) -> Any:
        """Start `command` by `start` (a Popen) as the leader of a session of this terminal."""
        process = start(
            command,
            stdin=self._jobs,
            stdout=self._jobs,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **options,
        )
        os.close(self._jobs)
        self._copier.start()
        return process

    def hang_up(self) -> None:
        """The kernel sends SIGHUP to the job, and what it writes from now on is an error."""
        self._hung_up.set()
        self._copier.join()
        os.close(self._ours)

    def _copy(self) -> None:
        with self._log.open("wb") as log:
            while not self._hung_up.is_set():
                if not select.select([self._ours], [], [], 0.1)[0]:
                    continue
                try:
                    log.write(os.read(self._ours, 65536))
                except OSError:  # the last process of the job has ended
                    return
                log.flush()
