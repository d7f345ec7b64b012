"""Standard output for a command's answer alone: whatever libraries print there comes on standard error."""

import os
import sys
from typing import IO, Any, cast

from ds_higgs.job.lossy_output import LossyStream

_answers: Any = None


def keep_for_answers() -> None:
    """Make standard output this process's answers': what Python, C++ or a child prints there goes to standard error.

    Once in a process, before anything is printed. A stream that the caller has closed is left so.
    """
    global _answers
    if _answers is not None or sys.stdout is None:
        return
    own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace", buffering=1)
    _answers = LossyStream(own)
    os.dup2(2 if sys.stderr is not None else os.open(os.devnull, os.O_WRONLY), 1)


def answer_stream() -> IO[str]:
    """Where answers go: standard output; nothing is raised where its reader has gone (`| head`)."""
    return cast(IO[str], sys.stdout if _answers is None else _answers)


def print_answer(*values: object) -> None:
    """Print what the user has asked for; anything else (progress, warnings) is logged or goes to standard error."""
    print(*values, file=answer_stream(), flush=True)
