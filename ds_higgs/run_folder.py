"""Reads what a run has written: its config, its metrics by event, its adapters."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ds_higgs.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, finished or not."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run in `path`.

        Raises:
            UserError: if the folder holds no run.
        """
        if not (path / "config.yaml").is_file() or not (path / "metrics.jsonl").is_file():
            raise UserError(f"{path}: not the folder of a run: expected config.yaml and metrics.jsonl in it")
        return cls(path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml, section by section."""
        return yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order; a last line that was cut off by a kill is left out.

        Raises:
            UserError: for any other line that is no JSON object, with its number.
        """
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        complete = [line for line in lines if line.endswith("\n")]
        return [_parse_line(line, f"{file}:{number}") for number, line in enumerate(complete, start=1)]

    def events(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind, in order."""
        return [line for line in self.metrics if line["event"] == event]

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.events("step")), default=0)

    def find_adapter(self, step: int | None) -> Path:
        """The adapter saved at `step`; None: the final one, else the newest.

        Raises:
            UserError: if there is none, listing those that there are.
        """
        folder = self.path / "adapters"
        steps = {
            int(match[1]): path for path in folder.glob("step-*") if (match := re.match(r"step-(\d+)$", path.name))
        }
        if step is None and (folder / "final").is_dir():
            return folder / "final"
        if step is None and steps:
            return steps[max(steps)]
        if step is not None and step in steps:
            return steps[step]
        found = ", ".join(str(number) for number in sorted(steps)) or "none"
        raise UserError(f"{folder}: no adapter of step {step if step is not None else '(any)'}; found steps: {found}")


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        if isinstance(values["event"], str) and isinstance(values["step"], int):
            return values
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{where}: expected a JSON object with `event` and `step`")
