"""Which checkpoint a run goes on from: every file of it is verified, and all ranks agree."""

import logging
from pathlib import Path

import ds_higgs.checkpoint.collective as collective
from ds_higgs.checkpoint.advice import OTHER_CHECKPOINT, START_ANEW
from ds_higgs.checkpoint.folders import checkpoints_folder, clean_up, list_checkpoints, set_all_aside
from ds_higgs.checkpoint.marker import MarkerError, find_damage, read_marker
from ds_higgs.errors import UserError

logger = logging.getLogger(__name__)


def find_checkpoint(run_dir: Path, *, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0. Called by every rank.

    resume: "auto" takes the newest complete one of the run and names those it refuses; "never" moves the run's old
        checkpoints to `checkpoints/superseded/`; anything else is a path: a checkpoint, or a run's folder, whose
        newest one is taken.

    Raises:
        UserError: a path that is no complete, undamaged checkpoint, naming the file that is wrong.
    """
    folder = checkpoints_folder(run_dir)
    if resume == "never":
        collective.on_rank_zero(lambda: set_all_aside(folder))
        return None
    if resume == "auto":
        collective.on_rank_zero(lambda: clean_up(folder))
        return _newest_usable(folder)
    return _explicit(Path(resume))


def saved_stage(run_dir: Path, *, resume: str) -> int | None:
    """The ZeRO stage of the checkpoint that `find_checkpoint` would look at first; nothing is verified or moved."""
    return collective.on_rank_zero(lambda: _stage_of_newest(run_dir, resume))


def _stage_of_newest(run_dir: Path, resume: str) -> int | None:
    if resume == "never":
        return None
    named = run_dir if resume == "auto" else Path(resume)
    folder = checkpoints_folder(named)
    for path in list_checkpoints(folder) if folder.is_dir() else [named]:
        try:
            return read_marker(path).zero_stage
        except MarkerError:
            continue
    return None


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint: each rank hashes its share of the files, and all ranks get all problems."""
    problems: list[str] = []
    try:
        marker = read_marker(path)
        names = sorted(marker.files)[collective.rank() :: collective.world_size()]
        problems = find_damage(path, {name: marker.files[name] for name in names})
    except MarkerError as error:
        problems = [str(error)]
    by_rank = collective.gather(problems)
    return sorted({problem for rank_problems in by_rank for problem in rank_problems})


def _newest_usable(folder: Path) -> Path | None:
    for path in collective.on_rank_zero(lambda: list_checkpoints(folder)):
        problems = verify_checkpoint(path)
        if not problems:
            return path
        if collective.rank() == 0:
            logger.warning("refused the checkpoint %s: %s", path.name, "; ".join(problems))
    return None


def _explicit(path: Path) -> Path:
    if checkpoints_folder(path).is_dir():
        usable = _newest_usable(checkpoints_folder(path))
        if usable is None:
            raise UserError(f"checkpoint.resume: {path} holds no complete checkpoint; {START_ANEW}")
        return usable
    if not path.is_dir():
        raise UserError(f"checkpoint.resume: {path} does not exist; expected auto, never or a checkpoint's folder")
    if problems := verify_checkpoint(path):
        title = f"checkpoint.resume: {path} cannot be used:"
        raise UserError.from_problems(title, problems, advice=OTHER_CHECKPOINT)
    return path
