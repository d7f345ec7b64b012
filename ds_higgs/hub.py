"""The one place that downloads: repositories of the hub, the released ones at the revisions that this package reads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ds_higgs.errors import UserError

Answer = TypeVar("Answer")

RELEASED_REPOSITORY = "bosonai/higgs-audio-v2-generation-3B-base"
HIGGS_TOKENIZER = "bosonai/higgs-audio-v2-tokenizer"
# The names of one repository. A commit's hash is the same under all of them, so any may stand in for another.
RELEASED_NAMES = (RELEASED_REPOSITORY, "bosonai/higgs-tts-2-3b-base")
# The last revisions in the format that boson_multimodal reads: on 2026-04-04 both repositories were overwritten in
# place with that of transformers >= 5.3.
ORIGINAL_REVISION = "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
PINNED_REVISIONS = dict.fromkeys(RELEASED_NAMES, ORIGINAL_REVISION) | {
    HIGGS_TOKENIZER: "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}
_NOT_THERE = (RevisionNotFoundError, RepositoryNotFoundError, LocalEntryNotFoundError)


def is_released(repository: str) -> bool:
    """Whether `repository` is one of the released base checkpoint's names."""
    return repository in RELEASED_NAMES


def download(
    repository: str,
    *,
    what: str,
    revision: str | None = None,
    files: Sequence[str] | None = None,
    into: Path | None = None,
) -> Path:
    """The folder of a snapshot of `repository`, from the hub or from the hub's cache; goes on where it was cut off.

    Args:
        what: it is to a user ("base checkpoint"), for messages.
        revision: None means the pinned one of a released repository, the newest of any other.
        files: patterns of the files that are needed; all if None.
        into: a folder of the user's for the files; the hub's cache if None.

    Raises:
        UserError: it is no repository's name, is not there, or cannot be had.
    """
    revision = revision or PINNED_REVISIONS.get(repository)
    patterns = _listed(files)

    def fetch(name: str) -> str:
        if into is not None:  # without an answer of the hub, what lies there would be taken for all of it
            HfApi().model_info(name, revision=revision)
        return snapshot_download(name, revision=revision, allow_patterns=patterns, local_dir=into)

    return Path(_ask(repository, what, revision, fetch))


def list_files(repository: str, *, what: str, revision: str | None = None) -> list[str]:
    """The files of `repository`, as the hub lists them. Arguments and errors as of `download`."""
    revision = revision or PINNED_REVISIONS.get(repository)
    info = _ask(repository, what, revision, lambda name: HfApi().model_info(name, revision=revision))
    return [file.rfilename for file in info.siblings or ()]


def find_downloaded(repository: str, *, revision: str | None = None, files: Sequence[str] | None = None) -> Path | None:
    """The folder that `download` would return of what is in the hub's cache already, without asking the hub.

    Whether all of its files are there, only reading them tells.
    """
    revision = revision or PINNED_REVISIONS.get(repository)
    for name in _names(repository, revision):
        try:
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=_listed(files), local_files_only=True)
            )
        except (LocalEntryNotFoundError, HFValidationError):
            continue
    return None


def upload(folder: Path, repository: str, *, private: bool) -> None:
    """Send a folder to the hub, to a repository that is made where it is missing.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    try:
        HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with ds_higgs")
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"--push: {repository}: the hub does not take it: {error}; log in with `huggingface-cli login` (or "
            f"HF_TOKEN) as somebody who may write there. The export is whole in {folder}"
        ) from error


def _ask(repository: str, what: str, revision: str | None, question: Callable[[str], Answer]) -> Answer:
    """The answer to `question`, by the first name of the repository that has one."""
    failures: list[Exception] = []
    for name in _names(repository, revision):
        try:
            return question(name)
        except _NOT_THERE as error:  # under this name
            failures.append(error)
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise _explained(repository, what, revision, error) from error
    raise _explained(repository, what, revision, failures[0]) from failures[0]


def _listed(files: Sequence[str] | None) -> list[str] | None:
    return None if files is None else [*files]


def _names(repository: str, revision: str | None) -> list[str]:
    """The names to ask for: others of the same repository only where the revision says exactly what comes."""
    if not is_released(repository) or revision != ORIGINAL_REVISION:
        return [repository]
    return [repository, *(name for name in RELEASED_NAMES if name != repository)]


def _explained(repository: str, what: str, revision: str | None, error: Exception) -> UserError:
    prefix = f"{what} {repository}: no such folder, and "
    if isinstance(error, HFValidationError):
        return UserError(prefix + "not a hub repository's name (owner/name)")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{prefix}the hub repository has no revision {revision or 'main'}")
    if isinstance(error, GatedRepoError):
        return UserError(
            prefix + "the hub repository is gated: accept its terms on the hub and log in with `huggingface-cli login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError(prefix + "the hub repository does not exist on the hub, or is private")
    return UserError(
        f"{prefix}it cannot be downloaded from the hub ({error}); expected a folder or a hub repository that can be "
        "reached. Broken off: give the command again, it goes on. For a machine without network: `ds-higgs download "
        "--out DIR` on another, and DIR as model.base"
    )
