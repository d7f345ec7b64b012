"""Standard output and error that may lose their reader: a run goes on without its terminal."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A terminal that hung up, a pipe whose reader is gone.
_NO_READER = (errno.EIO, errno.EPIPE)


class LossyStream:
    """A text stream that drops what nobody can read any more; every other error is raised."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            return _dropped(error, text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            _dropped(error, "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lossy_output() -> Iterator[None]:
    """While open, `print`, progress bars and loggers survive the loss of the terminal that they write to."""
    usual = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = LossyStream(sys.stdout), LossyStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = usual


def _dropped(error: OSError, text: str) -> int:
    if error.errno not in _NO_READER:
        raise error
    return len(text)
