"""`ds-higgs evaluate RUN --all-steps`: every adapter that a run has kept, on the same samples, by the same judges.

Each is written down once it is measured: a comparison that was stopped goes on.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_higgs import __version__
from ds_higgs.adapters.applying import wearing
from ds_higgs.adapters.opening import open_adapter
from ds_higgs.batch import Batch
from ds_higgs.commands.choosing import Choice, MeasuredColumn, choose_column, measure_losses, measure_speech
from ds_higgs.commands.evaluate import (
    BASE,
    Evaluation,
    compare_kept_losses,
    compute_kept_losses,
    compute_losses,
    listen,
    summarise_samples,
)
from ds_higgs.commands.generate import SpeechOptions, VoiceOptions, load_voice
from ds_higgs.commands.voice import Voice
from ds_higgs.config import LossConfig
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.errors import UserError
from ds_higgs.files import hash_file, read_json, write_json
from ds_higgs.losses import LossWeights, Targets
from ds_higgs.run_folder import AVERAGED, EVALUATION_FILE, RunFolder
from ds_higgs.speech.judging import Judges
from ds_higgs.training.metrics import json_values
from ds_higgs.training.per_sample import sums_by_sample
from ds_higgs.training.step_module import StepModule, TargetScores
from ds_higgs.training.validation import build_loss_weights

logger = logging.getLogger(__name__)

RESULTS = "all_steps"  # in the evaluation's folder: what has been measured, a file for each adapter


@dataclass(frozen=True)
class Candidate:
    """One adapter of a run; the base where `adapter` is None."""

    name: str
    adapter: Path | None = None


@dataclass(frozen=True)
class Task:
    """What is done with every candidate.

    voice: options without an adapter, read as the run.
    keep: a manifest of what is to stay as it was; None: nothing is asked.
    """

    voice: VoiceOptions
    manifest: Path
    out: Path
    speech: SpeechOptions
    count: int
    batch_size: int
    judges: Judges
    keep: Path | None = None

    def identity(self) -> str:
        """Of everything that the numbers depend on, beside the adapter."""
        assert self.voice.read_as is not None
        with open_adapter(self.voice.read_as, base=self.voice.base) as newest:
            run = newest.run_config()
            base = newest.base
        facts = {
            "version": __version__,
            "voice": asdict(self.voice),
            "base": base,
            "run": None if run is None else {"data": run.data.model_dump(), "loss": run.loss.model_dump()},
            "manifests": [hash_file(file) for file in (self.manifest, self.keep) if file is not None],
            "speech": asdict(self.speech),
            "count": self.count,
            "judges": [(judge.model, getattr(judge, "language", None)) for judge in self.judges.present],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def list_candidates(run: RunFolder, *, with_base: bool) -> list[Candidate]:
    """The base, and every adapter that the run has kept, by step, beside each what the average of its weights is.

    Best and final are among them where no adapter is kept of their step.

    Raises:
        UserError: there is none.
    """
    adapters = []
    for _, path in sorted(run.list_adapters().items()):
        averaged = path / AVERAGED
        adapters.append(Candidate(path.name, path))
        adapters += [Candidate(f"{path.name}-{AVERAGED}", averaged)] if averaged.is_dir() else []
    if not adapters:
        raise UserError(f"{run.adapters}: no adapter to evaluate")
    return [*([Candidate(BASE)] if with_base else []), *adapters]


def compare_all_steps(
    run: RunFolder, task: Task, *, with_base: bool, by: str | None
) -> tuple[list[MeasuredColumn], Choice]:
    """Measure every adapter of `run`; all of it goes to evaluation.json.

    Args:
        by: the measure to choose by; None: the first of what listeners and losses know.

    Raises:
        UserError: for what is missing or does not fit.
    """
    candidates = list_candidates(run, with_base=with_base)
    bench = _Bench(task)
    columns = []
    for number, candidate in enumerate(candidates, start=1):
        column = bench.measure(candidate)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in column.values().items())
        logger.info("%s (%d of %d): %s", candidate.name, number, len(candidates), shown)
        columns.append(column)
    compare_kept_losses([column.evaluation for column in columns])
    choice = choose_column(columns, by=by)
    record = {
        "manifest": str(task.manifest),
        "columns": [column.as_json() for column in columns],
        "choice": asdict(choice),
    }
    write_json(task.out / EVALUATION_FILE, json_values(record))
    return columns, choice


class _Bench:
    """Measures one candidate after another with one model, which is loaded where a result is missing."""

    def __init__(self, task: Task):
        self._task = task
        self._identity = task.identity()
        (task.out / RESULTS).mkdir(parents=True, exist_ok=True)

    def measure(self, candidate: Candidate) -> MeasuredColumn:
        """What is known of a candidate from before, or measured now."""
        file = self._task.out / RESULTS / f"{candidate.name}.json"
        identity = {"task": self._identity, "adapter": _fingerprint(candidate.adapter)}
        result = self._read(file, identity)
        if result is None:
            result = {"identity": identity, **self._measure_now(candidate)}
            write_json(file, json_values(result))
        weights = LossWeights(**{**result["weights"], "codebooks": tuple(result["weights"]["codebooks"])})
        measured = [measure_losses(np.array(result["losses"]), weights)]
        if result["samples"]:
            measured.append(measure_speech(result["samples"]))
        return MeasuredColumn(Evaluation(candidate.name, result["values"], result["samples"]), tuple(measured))

    def _read(self, file: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
        """What was written down of the same task and adapter, its speech still there."""
        if not file.is_file():
            return None
        try:
            result = read_json(file)
        except UserError as error:
            logger.warning("%s; measuring it again", error)
            return None
        if result.get("identity") != identity:
            return None
        is_there = all((self._task.out / row["file"]).is_file() for row in result["samples"])
        return result if is_there else None

    def _measure_now(self, candidate: Candidate) -> dict[str, Any]:
        voice, _ = self._voice
        if candidate.adapter is None:
            return self._measure_voice(voice, candidate.name)
        with (
            open_adapter(candidate.adapter, base=self._task.voice.base) as opened,
            wearing(voice.model, opened) as model,
        ):
            return self._measure_voice(replace(voice, model=model), candidate.name)

    def _measure_voice(self, voice: Voice, name: str) -> dict[str, Any]:
        task, (_, loss) = self._task, self._voice
        sums: list[torch.Tensor] = []
        placeholder_ids = StepModule(voice.model).placeholder_ids

        def add(batch: Batch, targets: Targets, scores: TargetScores) -> None:
            sums.append(sums_by_sample(batch, targets, scores, placeholder_ids=placeholder_ids))

        values = compute_losses(voice, self._dataset, loss, batch_size=task.batch_size, each=add)
        values["num_samples"] = len(self._dataset)
        samples = listen(
            voice, self._dataset, task.out, name=name, speech=task.speech, count=task.count, judges=task.judges
        )
        if task.keep is not None:
            values |= compute_kept_losses(voice, task.keep, loss, batch_size=task.batch_size)
        weights = build_loss_weights(loss, num_codebooks=voice.rules.layout.num_codebooks)
        return {
            "values": values | summarise_samples(samples),
            "samples": samples,
            "losses": torch.cat(sums).tolist(),
            "weights": asdict(weights),
        }

    @cached_property
    def _voice(self) -> tuple[Voice, LossConfig]:
        self._task.judges.load()
        return load_voice(self._task.voice)

    @cached_property
    def _dataset(self) -> HiggsDataset:
        return self._voice[0].read_manifest(self._task.manifest)


def _fingerprint(adapter: Path | None) -> list[list[str | int]] | None:
    """The files of an adapter, their sizes and times: one that was written again is measured again."""
    if adapter is None:
        return None
    found = [(file, file.stat()) for file in sorted(adapter.iterdir()) if file.is_file()]
    return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in found]
