"""Whether a file is a manifest that was written here and has not been changed since: only that may be written over."""

import hashlib
import re
from pathlib import Path

from ds_higgs.errors import UserError

KEY = "made_by"
_UNSIGNED = "ds-higgs manifest " + "0" * 16
_SIGNATURE = re.compile(rb'("made_by": "ds-higgs manifest )([0-9a-f]{16})(")')


def unsigned() -> dict[str, str]:
    """What the first sample of a manifest gets before `sign`."""
    return {KEY: _UNSIGNED}


def sign(content: bytes) -> bytes:
    """The manifest with the hash of its own content in its first sample."""
    return _SIGNATURE.sub(lambda found: found[1] + _digest(content) + found[3], content, count=1)


def check_may_overwrite(path: Path, flag: str) -> None:
    """Raises UserError where `path` is a file that is not, or no more, as `sign` gave it."""
    if path.is_file() and not _is_ours(path.read_bytes()):
        raise UserError(
            f"{flag}: {path} exists and is not a manifest that ds-higgs wrote, or was changed since; "
            "expected another name, or --force to write over it"
        )


def _is_ours(content: bytes) -> bool:
    found = _SIGNATURE.search(content)
    if found is None:
        return False
    return found[2] == _digest(content[: found.start(2)] + b"0" * len(found[2]) + content[found.end(2) :])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode()
