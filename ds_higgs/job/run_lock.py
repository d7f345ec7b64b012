"""One run at a time in a run's folder: a lock that goes with its holder, on one machine and on shared file systems.

Two things tell whether a holder lives. The operating system frees its lock with the process, however that ends: this is
certain between processes of one machine, in whatever containers. Some network file systems keep such locks to the
machine, or have none: there the holder's beat counts, which is the lock file's time.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_higgs.errors import UserError
from ds_higgs.files import NO_LOCKS
from ds_higgs.job import distributed

logger = logging.getLogger("ds_higgs")

LOCK_FILE = "run.lock"
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0  # without a beat a holder on another machine counts as gone
PATIENCE_SECONDS = 10.0  # for a holder that is about to end: launchers may return before their ranks do
_REMOVALS = 20  # of the folder by others, between our making it and our opening a file in it
_CONFIRM_SECONDS = 1.0  # where there are no locks: for two that start at once to see each other


@dataclass(frozen=True)
class Holder:
    """The process that has a run's folder: rank 0 of the job. boot: which start of which machine it runs on."""

    host: str
    process: int
    boot: str
    started: float
    token: str

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(socket.gethostname(), os.getpid(), _boot(), time.time(), uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {_duration(time.time() - self.started)} ago"


class RunLock:
    """While open, no other job trains in `run_dir`. Every rank opens it; rank 0 holds the lock for the job.

    Raises:
        UserError: on every rank, where the folder cannot be written or another job has it, naming that one.
    """

    def __init__(self, run_dir: Path, *, patience_s: float = PATIENCE_SECONDS, silence_s: float = SILENCE_SECONDS):
        self.path = run_dir / LOCK_FILE
        self.patience_s = patience_s
        self.silence_s = silence_s
        self._descriptor: int | None = None
        self._released = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)

    def __enter__(self) -> "RunLock":
        distributed.on_main_rank(self.acquire)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, from a holder that is gone too."""
        deadline = time.monotonic() + self.patience_s
        while not self._take(deadline):
            pass
        self._beat.start()

    def release(self) -> None:
        """Let the lock go, and leave nothing of it; a folder that the run has not written to goes with it."""
        if self._descriptor is None:
            return
        self._released.set()
        self._beat.join()
        with suppress(OSError):  # a folder that somebody removed, or that has become read-only
            self.path.unlink()
            self.path.parent.rmdir()
        os.close(self._descriptor)
        self._descriptor = None

    def _take(self, deadline: float) -> bool:
        """One attempt; False where the file was removed by its holder meanwhile."""
        descriptor = self._open()
        try:
            certain = self._wait_for_lock(descriptor, deadline)
            if not self._is_current(descriptor):
                return False
            self._check_gone(descriptor, certain=certain)
            own = Holder.this_process()
            _write(descriptor, own)
            if not certain:
                self._confirm(own)
            self._descriptor, descriptor = descriptor, -1
        finally:
            if descriptor != -1:
                os.close(descriptor)
        return True

    def _open(self) -> int:
        try:
            for _ in range(_REMOVALS):
                with suppress(FileNotFoundError, FileExistsError):  # whoever lets the lock go may remove the folder
                    return self._create()
            return self._create()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"run.output_dir: {self.path.parent} cannot be written: {reason}") from error

    def _create(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def _wait_for_lock(self, descriptor: int, deadline: float) -> bool:
        """Get the system's lock; False where the file system has none.

        It is the process's, not the file's: data workers, which are forked, do not inherit it.
        """
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return False
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() > deadline:
                raise self._in_use(_read(descriptor))
            time.sleep(0.2)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _check_gone(self, descriptor: int, *, certain: bool) -> None:
        """Make sure that the holder who left its name in the file lives no more.

        Raises:
            UserError: it beats, where no lock of the system can tell.
        """
        holder = _read(descriptor)
        if holder is None:
            return
        if not (certain and holder.boot == _boot()):
            self._listen(descriptor, holder)
        logger.warning("took %s over from %s: it is gone", self.path.parent, holder)

    def _listen(self, descriptor: int, holder: Holder) -> None:
        last_beat = os.fstat(descriptor).st_mtime
        silent_for = self._file_system_time() - last_beat  # by one clock, whatever the machines' clocks say
        if silent_for < self.silence_s:
            logger.warning("%s may be in use by %s: listening whether it still runs", self.path.parent, holder)
        until = time.monotonic() + self.silence_s - silent_for
        while time.monotonic() < until:
            time.sleep(min(1.0, self.silence_s / 10))
            if self._last_beat() != last_beat:
                raise self._in_use(holder)

    def _last_beat(self) -> float | None:
        try:
            with self.path.open("rb") as file:  # opened, because network file systems keep times for a while
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _file_system_time(self) -> float:
        probe = self.path.with_name(f".{uuid.uuid4().hex[:12]}.tmp")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _confirm(self, own: Holder) -> None:
        """Of two that start at once without locks, the one that wrote last goes on."""
        time.sleep(_CONFIRM_SECONDS)
        with self.path.open("rb") as file:
            found = _read(file.fileno())
        if found is None or found.token != own.token:
            raise self._in_use(found)

    def _in_use(self, holder: Holder | None) -> UserError:
        who = "a job that is just starting" if holder is None else str(holder)
        return UserError(
            f"run.output_dir: {self.path.parent} is in use by {who}; expected a folder in which no other job trains: "
            "wait for that one to end, stop it, or name another folder"
        )

    def _keep_beating(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            assert self._descriptor is not None
            with suppress(OSError):  # a beat that is missed changes nothing unless the next ten are, too
                os.utime(self._descriptor)


def _write(descriptor: int, holder: Holder) -> None:
    content = json.dumps(asdict(holder)).encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
    os.fsync(descriptor)


def _read(descriptor: int) -> Holder | None:
    """Who wrote the lock file; None for a file that is empty or half written."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _boot() -> str:
    """This start of this machine, which all its containers share."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _duration(seconds: float) -> str:
    minutes = int(max(seconds, 0) // 60)
    if minutes < 1:
        return f"{max(seconds, 0):.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
