"""The end of a process that used torch.distributed."""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def run_and_exit(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with the status that it returns (None: 0), without tearing Python down under torch's threads.

    A thread of gloo's that lets go of the last collective's tensor while Python finalises aborts the process
    (pytorch/pytorch#190489): a rank that is done would now and then end with -6, and its launcher would call the run
    failed. So Python does not finalise. All else that it does at an exit is done: it waits for the threads, reports an
    exception, and runs the exit functions, of which the one below is the first registered and therefore the last to
    run.
    """
    status = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)
    try:
        status = main() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        raise
    sys.exit(status)
