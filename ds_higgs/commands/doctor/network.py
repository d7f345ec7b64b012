"""Doctor: whether the hub answers, or what is needed of it is on this machine already."""

import os
from collections.abc import Iterator
from dataclasses import replace

from ds_higgs import hub
from ds_higgs.commands.doctor.finding import Finding
from ds_higgs.errors import UserError

DOWNLOAD = "ds-higgs download, here or on a machine with network (--out DIR, then model.base: DIR)"


def check_hub(repositories: tuple[str, ...] = (hub.RELEASED_REPOSITORY, hub.HIGGS_TOKENIZER)) -> Iterator[Finding]:
    """The released repositories at their pinned revisions."""
    for repository in repositories:
        finding = find_repository(repository, None)
        yield replace(finding, level="warn") if finding.level == "fail" else finding  # a job may use folders


def find_repository(repository: str, revision: str | None) -> Finding:
    """One repository: in the hub's cache, or at least in reach."""
    if (folder := hub.find_downloaded(repository, revision=revision)) is not None:
        return Finding(repository, f"in the hub's cache: {folder}")
    try:
        hub.list_files(repository, what="hub repository", revision=revision)
    except UserError as error:
        return Finding(repository, f"not in the hub's cache, and {_reason(error)}", "fail", DOWNLOAD)
    return Finding(repository, "on the hub, not downloaded yet", "warn", DOWNLOAD)


def _reason(error: UserError) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    first: BaseException = error
    while (cause := first.__cause__ or first.__context__) is not None:
        first = cause
    return f"the hub does not answer: {first}"
