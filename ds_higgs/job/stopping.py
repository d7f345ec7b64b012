"""Requests to stop (SIGTERM, SIGUSR1, SIGINT, SIGHUP, a lost launcher) as a flag that long work asks for."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

from ds_higgs.job import distributed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STATUS_AFTER_SIGINT = 128 + signal.SIGINT


class Stopped(Exception):
    """All ranks have agreed to stop, at a place where there is nothing to save."""


class StopRequests:
    """While open, the stop signals only leave a note, so that all ranks can finish the step and save together.

    A second SIGINT ends the process at once. A handler cannot save: launchers signal their ranks one after another,
    and a save needs all of them. SIGHUP stays ignored where it was (nohup).

    is_agreed: whether all ranks have found out, at the same place, that one of them was asked.
    """

    def __init__(self, launcher_is_lost: Callable[[], bool] = lambda: False):
        self.reason: str | None = None
        self.heard: str | None = None
        self.is_agreed = False
        self._launcher_is_lost = launcher_is_lost
        self._interrupts = 0
        self._usual_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequests":
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._usual_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._usual_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self) -> bool:
        """Whether this rank was asked to stop; cheap enough for every step."""
        if self.reason is None and self._launcher_is_lost():
            self.reason = "the launcher is gone"
        return self.reason is not None

    def requested_anywhere(self) -> bool:
        """Whether this rank was asked to stop, or has heard that another one was; for work without collectives."""
        return self.requested() or self.heard is not None

    def hear(self, reason: str) -> None:
        """Take up that another rank was asked."""
        self.heard = self.heard or reason

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks, which have to call this together."""
        if not self.is_agreed:
            self.settle(distributed.any_rank(self.requested()))
        return self.is_agreed

    def settle(self, any_rank_was_asked: bool) -> None:
        """Take up what a reduction over all ranks has found."""
        if any_rank_was_asked:
            self.is_agreed = True
            self.hear("another rank was asked")

    def stop_here(self) -> None:
        """Leave, on all ranks together, where any of them was asked to stop.

        Raises:
            Stopped: if so.
        """
        if self.agreed():
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == 2:
                os.write(2, b"\nsecond SIGINT: stopping now, without saving\n")
                os._exit(STATUS_AFTER_SIGINT)
        self.reason = self.reason or signal.Signals(number).name


def ignore_stop_signals() -> None:
    """For helper processes such as data workers: their rank decides when they end.

    Launchers signal the whole process tree; a worker that died of it would fail the step that the rank still finishes.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
