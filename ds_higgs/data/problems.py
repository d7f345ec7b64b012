"""A problem of one sample: where it is, what was found, what was expected."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ds_higgs.errors import UserError
from ds_higgs.files import write_atomically

logger = logging.getLogger("ds_higgs")

MAX_LISTED = 50


class BadSampleError(ValueError):
    """A sample, or one audio clip of it, cannot be trained on.

    The message says what was found, `expected` what would be right; whoever catches it knows the place.
    """

    def __init__(self, message: str, expected: str | None = None):
        super().__init__(message)
        self.message = message
        self.expected = expected

    def of(self, thing: str) -> "BadSampleError":
        """The same, saying what it is wrong with."""
        return BadSampleError(f"{thing}: {self.message}", self.expected)


@dataclass(frozen=True)
class Problem:
    """What is wrong with the sample at `number` of the manifest `file` (index from 0, or line of JSON lines)."""

    file: str
    number: int
    sample: str
    message: str
    expected: str | None = None

    def __lt__(self, other: "Problem") -> bool:
        return (self.file, self.number, self.message) < (other.file, other.number, other.message)

    def __str__(self) -> str:
        return f"{self.sample}: {_reason(self)}"


def raise_problems(manifest: Path, problems: Iterable[Problem]) -> None:
    """Raise one UserError that lists the problems, the first MAX_LISTED of them in full."""
    listed = sorted(problems)
    samples = len({problem.number for problem in listed})
    lines = [str(problem) for problem in listed[:MAX_LISTED]]
    if len(listed) > MAX_LISTED:
        lines.append(f"and {len(listed) - MAX_LISTED} more; `ds-higgs validate` lists all of them")
    noun = "sample has" if samples == 1 else "samples have"
    title = f"{manifest}: {samples} {noun} problems (data.on_bad_sample: skip leaves such samples out):"
    raise UserError.from_problems(title, lines)


def write_rejected(path: Path, manifest: Path, problems: Iterable[Problem]) -> None:
    """Write the left-out samples of a manifest to rejected.jsonl, one line each with all its reasons.

    Lines of other manifests stay, earlier ones of this manifest go: a resumed run does not list a sample twice.
    """
    by_number: dict[int, list[Problem]] = {}
    for problem in sorted(problems):
        by_number.setdefault(problem.number, []).append(problem)
    lines = _lines_of_other_manifests(path, manifest)
    for found in by_number.values():
        reasons = [_reason(problem) for problem in found]
        line = {"file": found[0].file, "number": found[0].number, "sample": found[0].sample, "reasons": reasons}
        lines.append(json.dumps(line, ensure_ascii=False))
    if lines or path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(line + "\n" for line in lines).encode())


def _reason(problem: Problem) -> str:
    return f"{problem.message} (expected {problem.expected})" if problem.expected else problem.message


def _lines_of_other_manifests(path: Path, manifest: Path) -> list[str]:
    """As text without its newline; what is no line of ours, in a file that was damaged, is dropped with a warning."""
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line and json.loads(line)["file"] != str(manifest):
                lines.append(line.decode("utf-8"))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("%s:%d: dropped a damaged line (%s)", path, number, type(error).__name__)
    return lines
