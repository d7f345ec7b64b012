"""What doctor says of one thing."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    level: "fail" where training would not start or would die, "warn" where it would be slow or may surprise.
    cure: what to do, where it is not "ok".
    """

    what: str
    found: str
    level: Level = "ok"
    cure: str = ""


def judge(what: str, found: str, cure: str, *, good: bool, otherwise: Level = "fail") -> Finding:
    """A finding that is ok where `good`, and else of the level `otherwise` with its cure."""
    return Finding(what, found) if good else Finding(what, found, otherwise, cure)
