"""The marker that makes a checkpoint complete: size and SHA-256 of every file, and what the checkpoint belongs to."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_higgs.files import hash_file

MARKER_NAME = "complete.json"
FORMAT_VERSION = 1
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint as it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Marker:
    """What `complete.json` says.

    files: by name, every file of the checkpoint but the marker itself.
    trainable: name and shape of every trainable tensor, in the optimizer's order.
    fixed: what the run may not change when it resumes (base checkpoint, LoRA shape), by config key.
    validation_loss: of the last evaluation before the save, None before the first one.
    versions: of the packages that wrote the checkpoint, for people.
    """

    step: int
    world_size: int
    zero_stage: int
    precision: str
    trainable: list[tuple[str, list[int]]]
    fixed: dict[str, object]
    validation_loss: float | None
    versions: dict[str, str]
    files: dict[str, FileRecord]
    format_version: int = FORMAT_VERSION


class MarkerError(ValueError):
    """The checkpoint is incomplete: its marker is missing or is not what was written."""


def encode_marker(marker: Marker) -> bytes:
    """The bytes of `complete.json`, which hold their own checksum."""
    fields = asdict(marker)
    return json.dumps({"sha256": _checksum(fields), **fields}, indent=1).encode()


def read_marker(folder: Path) -> Marker:
    """Read the marker of a checkpoint's folder.

    Raises:
        MarkerError: naming the file, when it is missing, damaged or of another format.
    """
    path = folder / MARKER_NAME
    try:
        fields = json.loads(path.read_bytes())
        checksum = fields.pop("sha256")
    except FileNotFoundError:
        raise MarkerError(f"{path} is missing: the checkpoint was never completed") from None
    except (ValueError, KeyError, AttributeError):
        raise MarkerError(f"{path} is damaged: it is not the JSON object that was written") from None
    if checksum != _checksum(fields):
        raise MarkerError(f"{path} is damaged: its content does not fit its own checksum")
    if fields["format_version"] != FORMAT_VERSION:
        raise MarkerError(f"{path} has format {fields['format_version']}; this version reads {FORMAT_VERSION}")
    fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
    fields["trainable"] = [(name, shape) for name, shape in fields["trainable"]]
    return Marker(**fields)


def find_damage(folder: Path, files: dict[str, FileRecord]) -> list[str]:
    """What is wrong with these files of a checkpoint, one sentence each that names the file."""
    return [problem for name, record in files.items() if (problem := _find_file_damage(folder / name, record))]


def _find_file_damage(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != record.size:
        return f"{path} has {size} bytes, {record.size} were written"
    if hash_file(path) != record.sha256:
        return f"{path} is damaged: its SHA-256 is not the one that was written"
    return None


def _checksum(fields: dict) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
