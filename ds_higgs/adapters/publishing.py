"""What a published export brings: licences and notice of the base, no private path, something to hear."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_higgs import hub
from ds_higgs.errors import UserError

LICENCE_NAME = "boson-higgs-audio-2-community-license"
LICENCE_LINK = f"https://huggingface.co/{hub.RELEASED_REPOSITORY}/blob/{hub.ORIGINAL_REVISION}/LICENSE"
# As the base's licence words them; it asks for its own text and that of Llama 3's beside them.
BUILT_WITH = (
    "Built with Higgs Materials licensed from Boson AI USA, Inc., Copyright Boson AI USA, Inc., All Rights Reserved "
    "and Meta Llama 3 licensed under the Meta Llama 3 Community License, Copyright Meta Platforms, Inc., All Rights "
    "Reserved"
)
NOTICE = """Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. \
All Rights Reserved.
Boson Higgs Audio 2 is licensed under the Boson Community License, Copyright © Boson AI USA, Inc. All Rights Reserved.
"""
NUM_LICENCES = 2  # Boson's and Meta's
NAME_BEGINS = "higgs-audio-2"  # of what is made from the base, says its licence
NUM_SAMPLES = 3
_LEGAL = re.compile(r"(licen[cs]e|notice)", re.IGNORECASE)


def is_local(base: str) -> bool:
    """Whether a base is named by a place on this machine rather than by its hub id."""
    return base.startswith(("/", "~", ".")) or Path(base).exists()


def public_name(base: str) -> str:
    """A base's name for others: its hub id, or the last part of its path."""
    return Path(base).name if is_local(base) else base


def without_places(value: Any) -> Any:
    """A configuration's values, each absolute path as its last part: where a file lies is nobody else's business."""
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def write_legal(out: Path, base: str, revision: str | None, more: Sequence[Path] = ()) -> list[str]:
    """Copy the licences that lie in the base's folder, and `more`, and write NOTICE; the licences' names.

    What the base brings as its own notice comes after the one that its licence asks for.
    """
    folder = Path(base) if is_local(base) else hub.find_downloaded(base, revision=revision)
    files = [] if folder is None else [path for path in sorted(folder.iterdir()) if path.is_file()]
    own = [path for path in (*files, *more) if _LEGAL.search(path.name)]
    notices = [path.read_text(encoding="utf-8") for path in own if path.name.upper().startswith("NOTICE")]
    added = [text for text in notices if text.strip() not in NOTICE]
    (out / "NOTICE").write_text("\n".join([NOTICE, *added]), encoding="utf-8")
    licences = [path for path in own if not path.name.upper().startswith("NOTICE")]
    for path in licences:
        shutil.copyfile(path, out / path.name)
    return [path.name for path in licences]


def copy_samples(source: Path, step: int | None, out: Path) -> list[str]:
    """Copy what the adapter said in its run to `out`/samples; names below `out`, none where nothing was recorded."""
    heard = [folder for folder in sorted((source / "samples").glob("step-*")) if list(folder.glob("*.wav"))]
    known = [folder for folder in heard if step is None or int(folder.name.removeprefix("step-")) <= step]
    if not known:
        return []
    (out / "samples").mkdir()
    names = []
    for path in sorted(known[-1].glob("*.wav"))[:NUM_SAMPLES]:
        shutil.copyfile(path, out / "samples" / path.name)
        names.append(f"samples/{path.name}")
    return names


def check_may_be_published(repository: str, base: str, licences: Sequence[str]) -> None:
    """Raises UserError, with all that is missing for the hub."""
    problems = []
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        problems.append(f"--push: found {repository!r}, expected OWNER/NAME")
    elif not repository.partition("/")[2].lower().replace("_", "-").startswith(NAME_BEGINS):
        problems.append(f"--push: {repository}: the base's licence asks for a name that begins with {NAME_BEGINS}")
    if is_local(base):
        problems.append(f"the base is named by its place here, {base}; expected its hub id: --base OWNER/NAME")
    if len(set(licences)) < NUM_LICENCES:
        found = ", ".join(licences) or "none"
        problems.append(
            f"licences found: {found}; expected Boson's and Meta Llama 3's: --licence-file FILE for each "
            f"({LICENCE_LINK}, https://www.llama.com/llama3/license/)"
        )
    if problems:
        raise UserError.from_problems("this export cannot be published yet", problems)
