"""The folder of a run: what every file in it is called, and how it is read, whole or damaged."""

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_higgs.config import Config
from ds_higgs.config.file import load_config, read_yaml, validate_config, write_config
from ds_higgs.errors import UserError
from ds_higgs.files import mend_folders, read_json, read_json_lines, set_aside, write_json

logger = logging.getLogger(__name__)

FAILURE_FILE = "failure.txt"
EVALUATION_FILE = "evaluation.json"  # in evaluation/, or wherever `ds-higgs evaluate` was told to write
RECORD_FILE = "training.json"  # in an adapter's folder: see `adapters.record`
FINAL, BEST = "final", "best"  # beside adapters/step-XXXXXXXX
AVERAGED = "ema"  # in adapters/step-XXXXXXXX and final: the same of the averaged weights
TARGETS, REFERENCES = "target", "reference"  # beside samples/step-XXXXXXXX
# Reasons of an "end" line with which a run has made its last step.
_FINISHED = ("done", "no better")


def step_name(step: int) -> str:
    """The name of what is kept of a step: a checkpoint, an adapter, samples."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a name tells; None for other names."""
    match = re.fullmatch(r"step-([0-9]{1,12})", name)
    return int(match[1]) if match else None


def read_stored_config(values: Mapping[str, Any], *, where: str) -> Config:
    """A configuration that a run wrote down, in a checkpoint or beside an adapter, validated.

    Raises:
        UserError: where this version does not know it; `where` names its place.
    """
    return validate_config(values, source=where)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: about to begin, in progress or ended."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run in `path`.

        Raises:
            UserError: if the folder holds no run.
        """
        run = cls(path)
        if not run.config_file.is_file() or not run.metrics_file.is_file():
            raise UserError(f"{path}: not the folder of a run: expected config.yaml and metrics.jsonl in it")
        return run

    # Names.

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def deepspeed_config_file(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rejected_file(self) -> Path:
        return self.path / "rejected.jsonl"

    @property
    def failure_file(self) -> Path:
        """Why the last start failed; not there once the run goes on."""
        return self.path / FAILURE_FILE

    @property
    def mended_failure_file(self) -> Path:
        """Why an earlier start failed, after which the run went on."""
        return self.path / "failure-mended.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def evaluation(self) -> Path:
        """What `ds-higgs evaluate` writes where it is told nothing else."""
        return self.path / "evaluation"

    def nonfinite_file(self, step: int, rank: int) -> Path:
        return self.path / f"nonfinite-{step_name(step)}-rank-{rank:05d}.json"

    # Reading.

    @cached_property
    def config(self) -> Config:
        """config.yaml, validated.

        Raises:
            UserError: where it is damaged, or of a version that had other keys.
        """
        return load_config(self.config_file, {})

    @cached_property
    def config_values(self) -> dict[str, Any]:
        """config.yaml as plain values, to be shown: whatever version wrote it."""
        return read_yaml(self.config_file)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order, without those that are damaged."""
        return [line for line in read_json_lines(self.metrics_file) if is_event(line)]

    def events(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind, in order."""
        return [line for line in self.metrics if line["event"] == event]

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.events("step")), default=0)

    def rejected(self) -> list[dict[str, Any]]:
        """The samples that were left out, each with its `reasons`."""
        return [line for line in read_json_lines(self.rejected_file) if isinstance(line.get("reasons"), list)]

    def nonfinite_records(self) -> list[dict[str, Any]]:
        """What each rank wrote down of steps that were not finite."""
        files = sorted(self.path.glob("nonfinite-step-*.json"))
        return [record for file in files if (record := _read_if_whole(file)) is not None]

    def read_evaluation(self) -> dict[str, Any] | None:
        """What `ds-higgs evaluate` left in the run's folder."""
        file = self.evaluation / EVALUATION_FILE
        return _read_if_whole(file) if file.is_file() else None

    def sample_file(self, name: str | Path) -> Path | None:
        """A WAV of samples/, by its name as metrics lines have it; None for a name or a link that leads elsewhere."""
        return _wav_inside(self.samples, self.path / name)

    def evaluation_file(self, name: str | Path) -> Path | None:
        """A WAV of evaluation/, by its name as evaluation.json has it; None for one that leads elsewhere."""
        return _wav_inside(self.evaluation, self.evaluation / name)

    # Adapters.

    def list_adapters(self) -> dict[int, Path]:
        """Adapters by step: those of every save, and final and best under the step that they tell."""
        found = {}
        for name in (BEST, FINAL):
            if (step := self.adapter_step(self.adapters / name)) is not None:
                found[step] = self.adapters / name
        return found | self._adapters_of_steps()

    def find_adapter(self, step: int | None) -> Path:
        """The adapter saved at `step`; None: the final one, unless there is a newer one.

        Raises:
            UserError: if there is none, listing those that there are.
        """
        steps = self._adapters_of_steps()
        if step is None:
            final = self.adapters / FINAL
            final_step = self.adapter_step(final)
            if final.is_dir() and (not steps or (final_step is not None and final_step >= max(steps))):
                return final
            if steps:
                return steps[max(steps)]
        known = self.list_adapters()
        if step in known:
            return known[step]
        found = ", ".join(str(number) for number in sorted(known)) or "none"
        raise UserError(
            f"{self.adapters}: no adapter of step {step if step is not None else '(any)'}; found steps: {found}"
        )

    def adapter_step(self, adapter: Path) -> int | None:
        """The step that an adapter of this run was saved at; None where it is not there or not known."""
        if not adapter.is_dir():
            return None
        record = _read_if_whole(adapter / RECORD_FILE) if (adapter / RECORD_FILE).is_file() else None
        if record is not None and _is_step(record.get("step")):
            return record["step"]
        return self._step_at_the_end() if adapter.name == FINAL else step_of(adapter.name)

    def _adapters_of_steps(self) -> dict[int, Path]:
        paths = {step_of(path.name): path for path in self.adapters.glob("step-*") if path.is_dir()}
        return {step: path for step, path in paths.items() if step is not None}

    def _step_at_the_end(self) -> int | None:
        """The step of adapters/final where it has no record: that of the end, unless the run went on after it."""
        ends = [line["step"] for line in self.events("end") if line.get("reason") in _FINISHED]
        return ends[-1] if ends else None

    # Writing.

    def begin(self, config: Config, deepspeed_config: dict[str, Any]) -> None:
        """Make the folder, with config.yaml and ds_config.json; an earlier start's failure counts as mended."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_config(config, self.config_file)
        write_json(self.deepspeed_config_file, deepspeed_config)
        if self.failure_file.exists():
            self.failure_file.replace(self.mended_failure_file)

    def set_adapters_aside(self, *, reached: int, finished: bool, best_step: int | None) -> None:
        """Move what the run no longer stands for to adapters/superseded/: what is after the step that it goes on from.

        Args:
            reached: the step that the run goes on from; -1 where it starts anew.
            finished: whether it makes no further step, so that adapters/final stays what it is.
            best_step: of the best evaluation so far, which adapters/best has to be of; None: there was none.
        """
        if not self.adapters.is_dir():
            return
        mend_folders(self.adapters)
        for step, path in self._adapters_of_steps().items():
            if step > reached:
                set_aside(path)
        final_stays = finished and self.adapter_step(self.adapters / FINAL) in (reached, None)
        best_stays = best_step is not None and self.adapter_step(self.adapters / BEST) in (best_step, None)
        for name, stays in ((FINAL, final_stays), (BEST, best_stays)):
            if (self.adapters / name).is_dir() and not stays:
                set_aside(self.adapters / name)

    def prune_adapters(self, *, keep: int | None) -> None:
        """Delete all but the `keep` newest adapters of steps (None: keep all); final and best stay."""
        for _, path in sorted(self._adapters_of_steps().items(), reverse=True)[keep:] if keep else ():
            shutil.rmtree(path)


def _wav_inside(folder: Path, file: Path) -> Path | None:
    try:
        file = file.resolve()
    except (ValueError, OSError):  # a null byte, a loop of links
        return None
    return file if file.suffix == ".wav" and file.is_relative_to(folder.resolve()) else None


def is_event(line: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl tells what happened, and at which step."""
    return isinstance(line.get("event"), str) and _is_step(line.get("step"))


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_if_whole(file: Path) -> dict[str, Any] | None:
    try:
        return read_json(file)
    except UserError as error:
        logger.warning("%s; going on without it", error)
        return None
