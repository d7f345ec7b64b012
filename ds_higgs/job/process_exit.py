"""The end of a process that used torch.distributed."""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def run_and_exit(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with the status that it returns (None: 0), without tearing Python down under torch's threads.

    A thread of gloo's that lets go of the last collective's tensor while Python finalises aborts the process
    (pytorch/pytorch#190489): a rank that is done would now and then end with -6, and its launcher would call the run
    failed. So Python does not finalise. All else that it does at an exit is done: it waits for the threads, reports an
    exception (Ctrl-C in one line), and runs the exit functions, of which the one below is the first registered and
    therefore the last to run.
    """
    status = 1
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(status)

    atexit.register(leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        status = main() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except BaseException as error:
        # An import that is interrupted may end with another error.
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            raise
        status = 128 + signal.SIGINT
        print("ds-higgs: interrupted", file=sys.stderr, flush=True)
    sys.exit(status)
