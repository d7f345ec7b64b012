"""The worker processes of a data loader: which they are, and whether one that the rank waits for has been stopped."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ds_higgs.job.processes import OtherProcess
from ds_higgs.job.stopping import ignore_stop_signals

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Workers:
    """Of one loader: `starter` for its DataLoader, `waiting` around each wait for a batch.

    A worker that dies is found by the DataLoader; one that is stopped would keep its rank waiting without end.
    """

    def __init__(self) -> None:
        self._numbers: ctypes.Array | list[int] = []
        self._known: dict[int, OtherProcess] = {}
        self._waiting = False
        self._looks = 0

    @property
    def processes(self) -> list[int]:
        """Process numbers of the workers that have begun, in order."""
        return [number for number in self._numbers if number]

    def starter(self, count: int) -> Callable[[int], None]:
        """What `count` new workers have to call first, each with its place."""
        self._numbers = multiprocessing.RawArray(ctypes.c_int, count)
        return partial(_begin, self._numbers, os.getpid())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Hold this open while the rank waits for a batch."""
        self._looks, self._waiting = 0, True
        try:
            yield
        finally:
            self._waiting = False

    def stopped(self, *, looks: int) -> str | None:
        """A worker that was found stopped `looks` times in a row during one wait.

        For a thread that looks once a second. Looks are counted, not seconds: while all processes of a container are
        suspended nobody looks, so that it does not count.
        """
        found = self._first_stopped() if self._waiting else None
        self._looks = self._looks + 1 if found is not None else 0
        if found is None or self._looks < looks:
            return None
        return f"data worker {found} (process {self._numbers[found]}) is stopped and hands over no batch"

    def _first_stopped(self) -> int | None:
        for place, number in enumerate(self._numbers):
            if number and self._process(number).is_stopped():
                return place
        return None

    def _process(self, number: int) -> OtherProcess:
        if number not in self._known:
            self._known = {known: process for known, process in self._known.items() if known in self.processes}
            self._known[number] = OtherProcess(number)
        return self._known[number]


def _begin(numbers: ctypes.Array, rank: int, place: int) -> None:
    numbers[place] = os.getpid()
    ignore_stop_signals()
    _end_with(rank)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    The DataLoader's own look at the parent does not come to pass in a worker that waits for room in its pipe, whose
    other end it holds open itself.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
