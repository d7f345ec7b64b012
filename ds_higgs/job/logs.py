"""What a process says beside its answer: its own lines, and of its libraries' those that a user can act on."""

import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

logger = logging.getLogger("ds_higgs")
VERBOSE = "DS_HIGGS_VERBOSE"  # in the environment, so that ranks, trials and workers are what their parent is
PHASE_SECONDS = 3.0

# Beginnings of DeepSpeed's lines that nobody can act on: what it falls back to is said, or is as it should be.
_DEEPSPEED_CHATTER = ("Setting accelerator to CPU",)


def is_verbose() -> bool:
    """Whether libraries say all they have to say."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


def set_up_logging(rank: int = 0, world_size: int = 1) -> None:
    """Log to standard error: INFO on rank 0, warnings on the others; of libraries what users can act on."""
    logging.basicConfig(
        format="%(asctime)s %(message)s" if world_size == 1 else f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
    )
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    if not is_verbose():
        deepspeed.addFilter(_can_be_acted_on)  # kept when DeepSpeed, imported later, sets its logger up
        # Notices to those who write DeepSpeed and boson's codec, once per process and kind.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.(distributed|nn\.utils)")


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Say what is being done, where it takes longer than PHASE_SECONDS."""
    timer = threading.Timer(PHASE_SECONDS, logger.info, ["%s ...", what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def without_prints() -> Iterator[None]:
    """Drop what a library prints to standard output as a notice, unless all is to be said."""
    with nullcontext() if is_verbose() else redirect_stdout(io.StringIO()):
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bars of transformers, unless all is to be said: what takes long is a `phase` of ours.

    Not around what may download: the hub's bars, which tell how far it is, are switched with them.
    """
    from transformers.utils import logging as transformers_logging

    if is_verbose() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _can_be_acted_on(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_DEEPSPEED_CHATTER)
