"""DeepSpeed's extensions, compiled at first use: where they are kept, and no waiting for a lock that nobody holds."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# DeepSpeed's own default.
_SHARED_FOLDER = "/tmp/torch_extensions"


def prepare_compiler() -> None:
    """Let DeepSpeed find this environment's ninja, and keep what it compiles apart from other environments'.

    The default folder is shared by all environments and breaks when two DeepSpeed versions use it.
    """
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


@contextmanager
def loading_extensions() -> Iterator[None]:
    """Hold this open while DeepSpeed loads or compiles an extension.

    torch takes a file named `lock` for every load, and a process that is killed meanwhile leaves it behind: every later
    start then waits for it without end. The kernel releases our lock with its process. So whoever gets it for itself
    alone knows that nobody is loading, and that a `lock` file is a dead process's.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", _SHARED_FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ds_higgs.lock").open("w") as ours:
        if _lock_alone(ours.fileno()):
            for stale in folder.glob("*/lock"):
                stale.unlink(missing_ok=True)
        fcntl.flock(ours, fcntl.LOCK_SH)
        yield


def _lock_alone(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
