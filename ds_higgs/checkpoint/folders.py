"""The folder of a run's checkpoints: names, publication by rename, retention, and what a killed save left behind."""

import logging
import shutil
from pathlib import Path

from ds_higgs.checkpoint.marker import Marker, MarkerError, read_marker
from ds_higgs.checkpoint.writing import sync_folder, write_atomically

logger = logging.getLogger(__name__)

LATEST_NAME = "latest"
SUPERSEDED_NAME = "superseded"  # checkpoints of a future that the run went back from
_STEP_PREFIX = "step-"
_PARTIAL_PREFIX = ".partial-"
_REPLACED_PREFIX = ".replaced-"


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_name(step: int) -> str:
    return f"{_STEP_PREFIX}{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """All that are named like a checkpoint, complete or not, newest step first."""
    named = [path for path in folder.glob(f"{_STEP_PREFIX}*") if path.name[len(_STEP_PREFIX) :].isdigit()]
    return sorted(named, key=_step_of, reverse=True)


def begin_partial(folder: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into, after removing what earlier saves left unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    clean_up(folder)
    partial = folder / f"{_PARTIAL_PREFIX}{step_name(step)}"
    partial.mkdir()
    return partial


def publish(partial: Path, step: int) -> Path:
    """Give a written and synced checkpoint its name, then point `latest` at it."""
    folder = partial.parent
    final = folder / step_name(step)
    replaced = folder / f"{_REPLACED_PREFIX}{final.name}"
    sync_folder(partial)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(folder)
    write_atomically(folder / LATEST_NAME, final.name.encode())
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def clean_up(folder: Path) -> None:
    """Remove unfinished checkpoints; put a complete one back that was killed while it was being replaced."""
    for replaced in folder.glob(f"{_REPLACED_PREFIX}{_STEP_PREFIX}*"):
        original = folder / replaced.name[len(_REPLACED_PREFIX) :]
        if original.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(original)
    for partial in folder.glob(f"{_PARTIAL_PREFIX}*"):
        shutil.rmtree(partial)


def retain(folder: Path, *, newest: Path, keep_latest: int) -> None:
    """Delete complete checkpoints that are neither among the `keep_latest` newest nor the best by validation loss.

    Checkpoints of later steps than `newest` belong to a future that the run went back from: they are moved aside.
    """
    for path in list_checkpoints(folder):
        if _step_of(path) > _step_of(newest):
            _set_aside(path)
    complete = {path: marker for path in list_checkpoints(folder) if (marker := _marker_if_complete(path))}
    kept = set(list(complete)[:keep_latest]) | _best(complete)
    for path in set(complete) - kept:
        shutil.rmtree(path)


def set_all_aside(folder: Path) -> None:
    """Move every checkpoint of an earlier run into `superseded/`, for a run that starts anew in the same folder."""
    for path in list_checkpoints(folder):
        _set_aside(path)
    (folder / LATEST_NAME).unlink(missing_ok=True)


def _best(complete: dict[Path, Marker]) -> set[Path]:
    losses = {path: marker.validation_loss for path, marker in complete.items() if marker.validation_loss is not None}
    return {min(losses, key=lambda path: losses[path])} if losses else set()


def _set_aside(path: Path) -> None:
    shelf = path.parent / SUPERSEDED_NAME
    shelf.mkdir(exist_ok=True)
    number = 1
    while (target := shelf / f"{path.name}-{number}").exists():
        number += 1
    path.rename(target)
    logger.warning("moved %s to %s: it is from a later step than this run's", path, target)


def _marker_if_complete(path: Path) -> Marker | None:
    try:
        return read_marker(path)
    except MarkerError:
        return None


def _step_of(path: Path) -> int:
    return int(path.name[len(_STEP_PREFIX) :])
