"""The folder of a run's checkpoints: names, publication by rename, retention, and what a killed save left behind."""

import math
import shutil
from pathlib import Path

from ds_higgs.checkpoint.marker import Marker, MarkerError, read_marker
from ds_higgs.files import begin_folder, mend_folders, publish_folder, set_aside, write_atomically
from ds_higgs.run_folder import RunFolder, step_name, step_of

LATEST_NAME = "latest"


def checkpoints_folder(run_dir: Path) -> Path:
    return RunFolder(run_dir).checkpoints


def list_checkpoints(folder: Path) -> list[Path]:
    """All that are named like a checkpoint, complete or not, newest step first."""
    named = [path for path in folder.glob("step-*") if step_of(path.name) is not None]
    return sorted(named, key=_step_of, reverse=True)


def begin_partial(folder: Path, step: int) -> Path:
    """An empty folder to write a checkpoint into, after removing what earlier saves left unfinished."""
    clean_up(folder)
    return begin_folder(folder / step_name(step))


def publish(partial: Path, step: int) -> Path:
    """Give a written and synced checkpoint its name, then point `latest` at it."""
    final = partial.parent / step_name(step)
    publish_folder(partial, final)
    write_atomically(partial.parent / LATEST_NAME, final.name.encode())
    return final


def clean_up(folder: Path) -> None:
    """Remove unfinished checkpoints; put a complete one back that was killed while it was being replaced."""
    mend_folders(folder)


def retain(folder: Path, *, newest: Path, keep_latest: int, keep_bytes: float = math.inf) -> None:
    """Delete complete checkpoints that are neither among the `keep_latest` newest nor the best by validation loss.

    Checkpoints of later steps than `newest` belong to a future that the run went back from: they are moved aside.

    Args:
        keep_bytes: what those that stay take at most together; the newest and the best stay whatever they take.
    """
    for path in list_checkpoints(folder):
        if _step_of(path) > _step_of(newest):
            set_aside(path)
    complete = {path: marker for path in list_checkpoints(folder) if (marker := _marker_if_complete(path))}
    kept = _best(complete) | set(list(complete)[:1])
    for path in list(complete)[1:keep_latest]:
        if sum(_size(complete[one]) for one in kept | {path}) > keep_bytes:
            break
        kept.add(path)
    for path in set(complete) - kept:
        shutil.rmtree(path)


def set_all_aside(folder: Path) -> None:
    """Move every checkpoint of an earlier run into `superseded/`, for a run that starts anew in the same folder."""
    for path in list_checkpoints(folder):
        set_aside(path)
    (folder / LATEST_NAME).unlink(missing_ok=True)


def _size(marker: Marker) -> int:
    return sum(record.size for record in marker.files.values())


def _best(complete: dict[Path, Marker]) -> set[Path]:
    losses = {path: marker.validation_loss for path, marker in complete.items() if marker.validation_loss is not None}
    return {min(losses, key=lambda path: losses[path])} if losses else set()


def _marker_if_complete(path: Path) -> Marker | None:
    try:
        return read_marker(path)
    except MarkerError:
        return None


def _step_of(path: Path) -> int:
    step = step_of(path.name)
    assert step is not None, path
    return step
