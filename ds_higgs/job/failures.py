"""One failing rank ends all within seconds: every rank shows who failed first, and the run's folder keeps it.

Without this, the others wait in a collective for a rank that is gone until its timeout (30 minutes by default).
Each rank has a thread that beats in a key-value store, looks at the other ranks, and ends the process when a failure is
announced.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

from torch.distributed import DistError

from ds_higgs.job.failure_record import Failure
from ds_higgs.job.job_store import START_SECONDS, JobStore
from ds_higgs.job.peers import SILENCE_SECONDS, Peers
from ds_higgs.job.stopping import StopRequests

BEAT_SECONDS = 1.0
ROOT_CAUSE_SECONDS = 4.0  # that a broken collective waits for news of the rank that broke it, on one machine
LOST_STORE = "lost the connection to the job's store, which rank 0 or its launcher holds"
FAREWELL_SECONDS = 8.0  # that the failing rank waits for the others to go, so that its message comes last

Check = Callable[[], str | None]  # called once a second: what is wrong with this rank, if anything


class FailureWatch:
    """While open, an exception in any rank, or its death, ends every rank of the job.

    With one process it only keeps the message in the run's folder and lets the exception pass, and makes the checks.
    """

    def __init__(
        self, run_dir: Path | None, *, rank: int, world_size: int, launcher_is_lost: Callable[[], bool] = lambda: False
    ):
        self.run_dir = run_dir
        self.rank = rank
        self.world_size = world_size
        self.launcher_is_lost = launcher_is_lost
        self.checks: list[Check] = []
        self.stop_requests: StopRequests | None = None
        self._watcher: _Watcher | _Checker | None = None

    def __enter__(self) -> "FailureWatch":
        self._watcher = _Watcher(self) if self.world_size > 1 else _Checker(self)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._watcher is not None
        if _is_failure(error):
            self._fail(error)
        else:
            self._watcher.finish()

    @contextmanager
    def in_folder(self, run_dir: Path) -> Iterator[None]:
        """While open, a failure is kept in `run_dir`, and ends the ranks before anything outside is closed."""
        self.run_dir = run_dir
        try:
            yield
        except BaseException as error:
            if _is_failure(error):
                self._fail(error)
            raise

    def share(self, stop_requests: StopRequests) -> None:
        """Tell the other ranks of this rank's requests to stop, and this rank of theirs."""
        self.stop_requests = stop_requests

    def _fail(self, error: BaseException) -> None:
        """End all ranks; where there is one, the exception goes on by itself."""
        assert self._watcher is not None
        self._watcher.stop()
        self._watcher.fail(Failure.of(self.rank, error), error)

    def find_wrong(self) -> Failure | None:
        """What the checks find."""
        messages = (check() for check in self.checks)
        return next((Failure(self.rank, message) for message in messages if message is not None), None)


class _Checker:
    """The thread of a process that is alone: it makes the checks."""

    def __init__(self, watch: FailureWatch):
        self.watch = watch
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="failure-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)

    def finish(self) -> None:
        self.stop()

    def fail(self, failure: Failure, error: BaseException) -> None:
        """Keep the message; the exception goes on by itself."""
        failure.keep(self.watch.run_dir)

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            if (failure := self.watch.find_wrong()) is not None:
                failure.keep(self.watch.run_dir)
                _end_process(failure.shown(), failure.status)


class _Watcher(_Checker):
    """The thread of one rank among others, and the store that the ranks share."""

    def start(self) -> None:
        """Wait for all ranks to check in, then begin to watch."""
        self._store = JobStore(self.watch.rank, self.watch.world_size)
        self._store.check_in()
        self._wait_for_all()
        self._peers = Peers(self._store.peers(), rank=self.watch.rank)
        super().start()

    def finish(self) -> None:
        """This rank is through. It waits for the others, still watching, so that none of them finds it gone."""
        with suppress(RuntimeError):  # whoever holds the store may leave a moment earlier
            self._store.finish()
            while not all(self._store.has_finished(rank) for rank in range(self.watch.world_size)):
                time.sleep(0.05)
        self.stop()
        self._leave_in_order()

    def _leave_in_order(self) -> None:
        """Rank 0, which may hold the store, goes last: torch tells whoever still asks it in a screenful of frames."""
        if self.watch.rank == 0:
            self._wait_for_the_others()
            return
        with suppress(RuntimeError):  # its holder did not wait
            self._store.leave()

    def fail(self, failure: Failure, error: BaseException) -> None:
        """Announce this rank's failure, let the others go first, and end the process with the message last."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one of the others has gone
        first = self._first_failure(failure, may_be_a_consequence=_is_communication_error(error))
        if first.rank != self.watch.rank:
            self._end_after(first)
        first.keep(self.watch.run_dir)
        self._wait_for_the_others()
        time.sleep(0.2)  # for their last lines to reach the screen
        _end_process(first.shown(), first.status)

    def _wait_for_all(self) -> None:
        """A rank that fails before it gets here ends the others, too."""
        deadline = time.monotonic() + START_SECONDS
        while missing := self._store.missing():
            failure = self._store.announced()
            if failure is None and time.monotonic() > deadline:
                message = f"rank {missing[0]} has not started within {START_SECONDS:.0f} s of this one"
                failure = self._store.announce(Failure(missing[0], message))
            if failure is not None:
                self._end_after(failure)
            time.sleep(0.1)

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(BEAT_SECONDS):
            beat += 1
            try:
                failure = self._look(beat)
            except RuntimeError:  # whoever held the store, rank 0 or the launcher, has ended
                failure = self._look_without_store()
            if failure is not None:
                self._end_after(failure)

    def _look(self, beat: int) -> Failure | None:
        self._store.beat(beat)
        self._exchange_stop_requests()
        announced = self._store.announced()
        if announced is not None:
            # The same mistake may be about to be found here: give the rank the time to say so by itself.
            return None if self._stopped.wait(BEAT_SECONDS) else announced
        failure = self.watch.find_wrong() or self._peers.find_lost(self._store)
        return None if failure is None else self._store.announce(failure)

    def _exchange_stop_requests(self) -> None:
        requests = self.watch.stop_requests
        if requests is None:
            return
        if (reason := self._store.stop_reason()) is not None:
            requests.hear(f"{reason} on another rank")
        elif requests.requested():
            self._store.ask_to_stop(str(requests.reason))

    def _look_without_store(self) -> Failure | None:
        if self._stopped.wait(ROOT_CAUSE_SECONDS) or self.watch.launcher_is_lost():
            return None  # the run ends in order
        if (dead := self._peers.find_dead()) is not None:
            return self._peers.death_of(dead)
        if self._stopped.wait(SILENCE_SECONDS):
            return None
        return Failure(self.watch.rank, LOST_STORE)

    def _first_failure(self, own: Failure, *, may_be_a_consequence: bool) -> Failure:
        deadline = time.monotonic() + (self._root_cause_seconds() if may_be_a_consequence else 0)
        beat = 0
        try:
            while time.monotonic() < deadline:
                beat -= 1
                self._store.beat(beat)  # the thread that did this has stopped
                if (announced := self._store.announced()) is not None:
                    return announced
                if (lost := self._peers.find_lost(self._store)) is not None:
                    return self._store.announce(lost)
                time.sleep(0.2)
            return self._store.announce(own)
        except RuntimeError:  # no store any more: there is nobody to agree with
            if not may_be_a_consequence:
                return own
            dead = self._peers.find_dead()
            return replace(own, message=f"{own.message}\n{LOST_STORE}") if dead is None else self._peers.death_of(dead)

    def _root_cause_seconds(self) -> float:
        """A rank of another machine is known to be gone only by its silence."""
        return ROOT_CAUSE_SECONDS if self._peers.is_one_machine else SILENCE_SECONDS + 2

    def _end_after(self, failure: Failure) -> None:
        failure.keep(self.watch.run_dir)
        with suppress(RuntimeError):  # the failed rank held the store
            self._store.leave()
        told = f"rank {self.watch.rank}: ended because rank {failure.rank} failed: {failure.summary}"
        _end_process(told if failure.status == 1 else "", failure.status)

    def _wait_for_the_others(self) -> None:
        deadline = time.monotonic() + FAREWELL_SECONDS
        try:
            while time.monotonic() < deadline and self._store.num_left() < self.watch.world_size - 1:
                time.sleep(0.1)
        except RuntimeError:  # the store went with the others
            return


def _is_failure(error: BaseException | None) -> TypeGuard[BaseException]:
    return error is not None and not (isinstance(error, SystemExit) and not error.code)


def _is_communication_error(error: BaseException) -> bool:
    """Whether a collective broke, which is how another rank's death shows here."""
    if isinstance(error, DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(name in text for name in ("gloo", "nccl", "connection closed"))


def _end_process(message: str, status: int) -> None:
    """End without the usual clean-up: the process group's would wait for ranks that are gone."""
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
