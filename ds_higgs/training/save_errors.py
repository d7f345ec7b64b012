"""What a run does about files that cannot be written: it ends, or with `checkpoint.on_save_error: warn` goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

from ds_higgs.job.logs import logger


@contextmanager
def save_errors(*, tolerate: bool) -> Iterator[None]:
    """Raise what cannot be written inside, or only tell it. What is collective inside has to fail on every rank."""
    try:
        yield
    except OSError as error:
        if not tolerate:
            raise
        logger.warning("%s; going on without it", error)
