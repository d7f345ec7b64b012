"""One failing rank ends all within seconds: every rank shows who failed first, and the run's folder keeps it.

Without this, the others wait in a collective for a rank that is gone until its timeout (30 minutes by default).
Each rank has a thread that beats in a key-value store, watches a neighbour's beat and the processes of its own machine,
and ends the process when a failure is announced.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from ds_higgs.errors import UserError
from ds_higgs.run_folder import FAILURE_FILE

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0  # without a beat a rank counts as dead
ROOT_CAUSE_SECONDS = 4.0  # that a broken collective waits for news of the rank that broke it, on one machine
LOST_STORE = "lost the job's store: rank 0 or its launcher is gone"
FAREWELL_SECONDS = 8.0  # that the failing rank waits for the others to go, so that its message comes last


@dataclass(frozen=True)
class Failure:
    """The first failure of a job. status: the exit status for all ranks."""

    rank: int
    message: str
    status: int


class FailureWatch:
    """While open, an exception in any rank, or its death, ends every rank of the job.

    With one process it only keeps the message in the run's folder and lets the exception pass.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, world_size: int, launcher_is_lost: Callable[[], bool] = lambda: False
    ):
        self.run_dir = run_dir
        self.rank = rank
        self.world_size = world_size
        self._watcher: _Watcher | None = None
        self._launcher_is_lost = launcher_is_lost

    def __enter__(self) -> "FailureWatch":
        if self.world_size > 1:
            self._watcher = _Watcher(self)
            self._watcher.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            if self._watcher is not None:
                self._watcher.finish()
            return
        failure = Failure(self.rank, describe(error), status=2 if isinstance(error, UserError) else 1)
        if self._watcher is None:
            self.keep(failure)
            return
        self._watcher.stop()
        self._watcher.fail(failure, error)

    def keep(self, failure: Failure) -> None:
        """Write the failure into the run's folder, where a run has been set up in it and it can be written."""
        if not (self.run_dir / "config.yaml").is_file():
            return
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            (self.run_dir / FAILURE_FILE).write_text(f"{when} rank {failure.rank}: {failure.message}\n")
        except OSError as error:
            print(f"rank {self.rank}: could not write {FAILURE_FILE}: {error}", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """A user's mistake in its own words; anything else with the way that led to it."""
    if isinstance(error, UserError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


class _Watcher:
    """The thread of one rank, and the store that the ranks share."""

    def __init__(self, watch: FailureWatch):
        self.watch = watch
        self.thread = threading.Thread(target=self._run, name="failure-watch", daemon=True)
        self._stopped = threading.Event()
        self._store = _open_store()
        self._store.set(f"beat/{watch.rank}", "0")
        self._process_space = _process_space()
        self._store.set(f"process/{watch.rank}", json.dumps([self._process_space, os.getpid()]))
        self._processes = [json.loads(self._store.get(f"process/{rank}")) for rank in range(watch.world_size)]
        self._neighbour = (watch.rank + 1) % watch.world_size
        self._neighbours_beat = (b"", time.monotonic())

    def finish(self) -> None:
        """This rank is through. It waits for the others, so that none of them finds it gone."""
        with suppress(RuntimeError):  # whoever holds the store may leave a moment earlier
            self._store.set(f"finished/{self.watch.rank}", "")
            self._store.wait([f"finished/{rank}" for rank in range(self.watch.world_size)])
        self.stop()

    def stop(self) -> None:
        self._stopped.set()
        self.thread.join(timeout=10)

    def fail(self, failure: Failure, error: BaseException) -> None:
        """Announce this rank's failure, let the others go first, and end the process with the message last."""
        first = self._first_failure(failure, may_be_a_consequence=_is_communication_error(error))
        if first.rank == self.watch.rank:
            self.watch.keep(first)
            self._wait_for_the_others()
            _end_process(_shown(first), first.status)
        self._end_after(first)

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(BEAT_SECONDS):
            beat += 1
            try:
                failure = self._look(beat)
            except RuntimeError:  # the store is gone, and with it rank 0 or the launcher that held it
                failure = self._look_without_store()
            if failure is not None:
                self._end_after(failure)

    def _look(self, beat: int) -> Failure | None:
        self._store.set(f"beat/{self.watch.rank}", str(beat))
        announced = self._announced()
        if announced is not None:
            # The same mistake may be about to be found here: give the rank the time to say so by itself.
            return None if self._stopped.wait(BEAT_SECONDS) else announced
        if (dead := self._find_dead_rank()) is None:
            return None
        return self._announce(_death_of(dead))

    def _look_without_store(self) -> Failure | None:
        if self._stopped.wait(ROOT_CAUSE_SECONDS) or self.watch._launcher_is_lost():
            return None  # the run ends in order
        if (dead := self._find_dead_process()) is not None:
            return _death_of(dead)
        if self._stopped.wait(SILENCE_SECONDS):
            return None
        return Failure(self.watch.rank, LOST_STORE, status=1)

    def _find_dead_rank(self) -> int | None:
        dead = self._find_dead_process()
        if dead is None:
            return self._neighbour if self._neighbour_is_silent() else None
        return None if self._has_finished(dead) else dead

    def _find_dead_process(self) -> int | None:
        """The first rank of this machine whose process is gone."""
        for rank, (space, process) in enumerate(self._processes):
            if rank != self.watch.rank and space == self._process_space and _is_dead(process):
                return rank
        return None

    def _has_finished(self, rank: int) -> bool:
        return self._store.check([f"finished/{rank}"])

    def _neighbour_is_silent(self) -> bool:
        key = f"beat/{self._neighbour}"
        if self._has_finished(self._neighbour):
            return False
        beat, since = self._store.get(key), time.monotonic()
        if beat != self._neighbours_beat[0]:
            self._neighbours_beat = (beat, since)
        return since - self._neighbours_beat[1] > SILENCE_SECONDS

    def _first_failure(self, own: Failure, *, may_be_a_consequence: bool) -> Failure:
        deadline = time.monotonic() + (self._root_cause_seconds() if may_be_a_consequence else 0)
        try:
            while (now := time.monotonic()) < deadline:
                self._store.set(f"beat/{self.watch.rank}", f"waiting {now}")  # the thread that did this has stopped
                if (announced := self._announced()) is not None:
                    return announced
                if (dead := self._find_dead_rank()) is not None:
                    return self._announce(_death_of(dead))
                time.sleep(0.2)
            return self._announce(own)
        except RuntimeError:  # no store any more: there is nobody to agree with
            if not may_be_a_consequence:
                return own
            dead = self._find_dead_process()
            return replace(own, message=f"{own.message}\n{LOST_STORE}") if dead is None else _death_of(dead)

    def _root_cause_seconds(self) -> float:
        """A rank of another machine is known to be gone only by its silence."""
        one_machine = all(space == self._process_space for space, _ in self._processes)
        return ROOT_CAUSE_SECONDS if one_machine else SILENCE_SECONDS + 2

    def _announce(self, failure: Failure) -> Failure:
        """Make a failure known unless another one was first; return the first."""
        return _decode(self._store.compare_set("failure", "", json.dumps(asdict(failure))))

    def _announced(self) -> Failure | None:
        return _decode(self._store.get("failure")) if self._store.check(["failure"]) else None

    def _end_after(self, failure: Failure) -> None:
        self.watch.keep(failure)
        with suppress(RuntimeError):  # the failed rank held the store
            self._store.add("gone", 1)
        summary = failure.message.splitlines()[-1]
        told = f"rank {self.watch.rank}: ended because rank {failure.rank} failed: {summary}"
        _end_process(told if failure.status == 1 else "", failure.status)

    def _wait_for_the_others(self) -> None:
        deadline = time.monotonic() + FAREWELL_SECONDS
        try:
            while time.monotonic() < deadline and self._store.add("gone", 0) < self.watch.world_size - 1:
                time.sleep(0.1)
        except RuntimeError:  # the store went with the others
            return
        time.sleep(0.2)  # for their last lines to reach the screen


def _open_store() -> Store:
    """A connection of our own to the launch's store: the process group's blocks while a collective waits on it."""
    port = int(os.environ["MASTER_PORT"])
    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=60))
    return PrefixStore(f"ds_higgs/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _decode(value: bytes) -> Failure:
    return Failure(**json.loads(value))


def _death_of(rank: int) -> Failure:
    return Failure(rank, f"rank {rank} died without a message (killed by a signal, or out of memory)", status=1)


def _is_communication_error(error: BaseException) -> bool:
    """Whether a collective broke, which is how another rank's death shows here."""
    if isinstance(error, DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(name in text for name in ("gloo", "nccl", "connection closed"))


def _process_space() -> str:
    """Where a process id means the same process: this boot of this machine, and this container on it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _is_dead(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _shown(failure: Failure) -> str:
    return f"ds-higgs: {failure.message}" if failure.status == 2 else f"rank {failure.rank} failed:\n{failure.message}"


def _end_process(message: str, status: int) -> None:
    """End without the usual clean-up: the process group's would wait for ranks that are gone."""
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
