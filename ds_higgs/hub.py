"""The one place that downloads: repositories of the hub, the released ones at the revisions that this package reads."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ds_higgs.errors import UserError

RELEASED_REPOSITORY = "bosonai/higgs-audio-v2-generation-3B-base"
HIGGS_TOKENIZER = "bosonai/higgs-audio-v2-tokenizer"
# The last revisions in the format that boson_multimodal reads: on 2026-04-04 both repositories were overwritten in
# place with that of transformers >= 5.3.
ORIGINAL_REVISION = "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
PINNED_REVISIONS = {
    RELEASED_REPOSITORY: ORIGINAL_REVISION,
    HIGGS_TOKENIZER: "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}


def download(repository: str, *, what: str, revision: str | None = None, files: Sequence[str] | None = None) -> Path:
    """The folder of a snapshot of `repository`, from the hub or from the hub's cache.

    Args:
        what: it is to a user ("base checkpoint"), for messages.
        revision: None means the pinned one of a released repository, the newest of any other.
        files: patterns of the files that are needed; all if None.

    Raises:
        UserError: it is no repository's name, is not there, or cannot be had.
    """
    revision = revision or PINNED_REVISIONS.get(repository)
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=None if files is None else [*files])
        )
    except HFValidationError as error:
        raise UserError(f"{what} {repository}: no such folder, and not a hub repository's name (owner/name)") from error
    except (RevisionNotFoundError, GatedRepoError, RepositoryNotFoundError) as error:
        reason = {
            RevisionNotFoundError: f"has no revision {revision}",
            GatedRepoError: "is gated: accept its terms on the hub and log in with `huggingface-cli login`",
        }.get(type(error), "does not exist on the hub, or is private")
        raise UserError(f"{what} {repository}: no such folder, and the hub repository {reason}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{what} {repository}: no such folder, and it cannot be downloaded from the hub ({error}); "
            "expected a folder or a hub repository that can be reached"
        ) from error
