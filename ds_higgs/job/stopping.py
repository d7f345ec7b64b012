"""Requests to stop (SIGTERM, SIGUSR1, SIGINT, a lost launcher) as a flag that the training loop asks for."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_STATUS_AFTER_SIGINT = 128 + signal.SIGINT


class StopRequests:
    """While open, the stop signals only leave a note, so that all ranks can finish the step and save together.

    A second SIGINT ends the process at once. A handler cannot save: launchers signal their ranks one after another,
    and a save needs all of them.
    """

    def __init__(self, launcher_is_lost: Callable[[], bool] = lambda: False):
        self.reason: str | None = None
        self._launcher_is_lost = launcher_is_lost
        self._interrupts = 0
        self._usual_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequests":
        for number in STOP_SIGNALS:
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == 2:
                os.write(2, b"\nsecond SIGINT: stopping now, without saving\n")
                os._exit(_STATUS_AFTER_SIGINT)
        self.reason = self.reason or signal.Signals(number).name


def ignore_stop_signals() -> None:
    """For helper processes such as data workers: their rank decides when they end.

    Launchers signal the whole process tree; a worker that died of it would fail the step that the rank still finishes.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
