"""DeepSpeed's extensions, compiled at first use: where they are kept, and no waiting for a lock that nobody holds."""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ds_higgs.errors import UserError
from ds_higgs.files import NO_LOCKS

_VARIABLE = "TORCH_EXTENSIONS_DIR"


def prepare_compiler() -> None:
    """Let DeepSpeed find this environment's ninja, and keep what it compiles apart from other environments' and users'.

    The default folder, /tmp/torch_extensions, is shared by all environments and users: it breaks when two DeepSpeed
    versions use it, cannot be written by the second user, and whoever is first may put there what others load.
    """
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault(_VARIABLE, str(_find_own_folder()))


@contextmanager
def loading_extensions() -> Iterator[None]:
    """Hold this open while DeepSpeed loads or compiles an extension.

    torch takes a file named `lock` for every load, and a process that is killed meanwhile leaves it behind: every later
    start then waits for it without end. The kernel releases our lock with its process. So whoever gets it for itself
    alone knows that none of this user's processes is loading, and that a `lock` file of this user is a dead process's.
    On a file system without locks nothing can be known, and nothing is removed.
    """
    folder = Path(os.environ[_VARIABLE]) if _VARIABLE in os.environ else _find_own_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = (folder / f"ds_higgs-{os.getuid()}.lock").open("w")
    except OSError as error:
        raise UserError(f"{_VARIABLE}: {folder} cannot be written: {error.strerror or error}") from error
    with ours:
        if _lock(ours.fileno(), fcntl.LOCK_EX):
            _remove_stale(folder)
        _lock(ours.fileno(), fcntl.LOCK_SH)
        yield


def _find_own_folder() -> Path:
    """A folder that this user alone writes, in the environment or else in the user's cache, made if need be.

    Raises:
        UserError: where there is none.
    """
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    candidates = [
        Path(sys.prefix) / "torch_extensions",
        cache / "ds_higgs" / f"torch_extensions-{environment}",
    ]
    for folder in candidates:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
    raise UserError(
        f"{_VARIABLE}: not set, and none of {', '.join(map(str, candidates))} can be written; expected a folder of "
        "your own for the extensions that DeepSpeed compiles"
    )


def _remove_stale(folder: Path) -> None:
    for lock in folder.glob("*/lock"):
        with suppress(FileNotFoundError):
            if lock.stat().st_uid == os.getuid():
                lock.unlink()


def _lock(descriptor: int, kind: int) -> bool:
    """Take the lock, without waiting; False where others have it, or the file system has none."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
