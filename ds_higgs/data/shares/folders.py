"""A share's folder: what lies there, and what it says of itself.

CACHE/shares/NAME/00003-of-00064/found-*.arrow   the share's audio items; files-*.arrow   the files that they are in
CACHE/shares/NAME/00003-of-00064/codes/CODEC     its clips' codes, as in a code cache
CACHE/shares/NAME/00003-of-00064/share.json      written first when the work is known, last when it is done
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ds_higgs.data.identity import hash_manifest
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.shares.dealing import Share
from ds_higgs.files import write_json

SHARES_VERSION = 1  # raise it when audio would be dealt otherwise than before
_MARKER = "share.json"
_FOLDER = re.compile(r"(\d{5,})-of-(\d{5,})")


@dataclass(frozen=True)
class ShareMarker:
    """What a share says of itself.

    identity: see `identify_shares`; complete: whether every clip is encoded, or cannot be.
    num_clips: distinct ones that looked usable; failures: by key, those that were not: what was found, and expected.
    sizes: bytes of its files; checksums: of those that are tables of audio.
    """

    identity: str
    complete: bool
    num_clips: int
    failures: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "ShareMarker | None":
        """None where the folder has none of this version."""
        try:
            return cls(**json.loads((folder / _MARKER).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        write_json(folder / _MARKER, asdict(self))

    @property
    def errors(self) -> dict[str, BadSampleError]:
        """`failures`, as they were raised."""
        return {key: BadSampleError(*found) for key, found in self.failures.items()}


def identify_shares(manifest: Path, rules: SampleRules) -> str:
    """What a manifest's shares depend on: its content, the codec, and which clips and samples are refused.

    Raises:
        UserError: the manifest cannot be read.
    """
    described = {
        "version": SHARES_VERSION,
        "manifest": hash_manifest(manifest),
        "codec": rules.codec.identity,
        "limits": asdict(rules.limits),
        "exclude": sorted(name for name in rules.exclude if name.rpartition(":")[0] == manifest.name),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def share_folder(cache_dir: Path, identity: str, share: Share) -> Path:
    """Where a share's work goes."""
    return cache_dir / "shares" / identity[:24] / f"{share.number:05d}-of-{share.count:05d}"


def find_shares(cache_dir: Path, identity: str) -> Iterator[tuple[Share, Path]]:
    """The shares of a manifest that were begun in a cache folder."""
    for path in sorted((cache_dir / "shares" / identity[:24]).glob("*-of-*")):
        if named := _FOLDER.fullmatch(path.name):
            yield Share(int(named[1]), int(named[2])), path


def checksum_of(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found
