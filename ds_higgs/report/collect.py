"""Everything that the page tells about one run, as plain values for its script."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from ds_higgs.data.manifest import Entry, read_manifest, sample_id
from ds_higgs.errors import UserError
from ds_higgs.job.failures import FAILURE_FILE
from ds_higgs.report.series import EVAL_CURVES, SAMPLE_CURVES, STEP_CURVES, read_curve
from ds_higgs.run_folder import RunFolder
from ds_higgs.speech.in_training import summarise_rows
from ds_higgs.speech.prompts import spoken_text

MAX_LISTED = 50
HISTOGRAM_BINS = 12


def collect_run(run: RunFolder) -> dict[str, Any]:
    """The values of one run, all but its audio."""
    return {
        "name": run.name,
        "path": str(run.path),
        "summary": summarise(run),
        "curves": collect_curves(run),
        "evaluations": run.events("eval"),
        "comparison": read_comparison(run),
        "data": {key: describe_manifest(run, f"{key}_manifest") for key in ("train", "val")},
        "trouble": find_trouble(run),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "settings": dict(_flatten(run.config)),
    }


def summarise(run: RunFolder) -> dict[str, Any]:
    """The numbers at the top of the page."""
    steps, evals, ends = run.events("step"), run.events("eval"), run.events("end")
    audio_losses = [line["audio_loss"] for line in evals if isinstance(line["audio_loss"], float)]
    return {
        "status": ends[-1]["reason"] if ends else "not ended",
        "steps": run.last_step,
        "epochs": steps[-1].get("epoch", 0) if steps else 0,
        "samples": sum(line.get("num_samples", 0) for line in steps),
        "tokens": sum(line.get("num_tokens", 0) for line in steps),
        "audio_targets": sum(line.get("num_audio_targets", 0) for line in steps),
        "seconds": sum(line.get("step_time_s", 0.0) for line in steps),
        "tokens_per_second": median([line.get("tokens_per_second", 0.0) for line in steps]) if steps else None,
        "peak_memory_gib": max((line.get("peak_memory_gib", 0.0) for line in steps), default=None),
        "first_audio_loss": audio_losses[0] if audio_losses else None,
        "best_audio_loss": min(audio_losses, default=None),
        "last_audio_loss": audio_losses[-1] if audio_losses else None,
    }


def collect_curves(run: RunFolder) -> dict[str, list]:
    """Curves by name: "train/loss", "val/audio_loss", "val/codebook_3", "samples/stop_rate" and so on."""
    steps, evals = run.events("step"), run.events("eval")
    curves = {f"train/{key}": read_curve(steps, key) for key in STEP_CURVES}
    curves |= {f"val/{key}": read_curve(evals, key) for key in EVAL_CURVES}
    for name, lines in (("train", steps), ("val", evals)):
        num_codebooks = len(lines[-1].get("audio_loss_per_codebook", ())) if lines else 0
        for index in range(num_codebooks):
            curves[f"{name}/codebook_{index}"] = read_curve(lines, "audio_loss_per_codebook", index)
    spoken = _by_step(run.events("sample"))
    rows = [{"step": step, **summarise_rows(lines)} for step, lines in spoken.items()]
    curves |= {f"samples/{key}": read_curve(rows, key) for key in SAMPLE_CURVES}
    return {name: points for name, points in curves.items() if points}


def _by_step(lines: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    groups = itertools.groupby(sorted(lines, key=lambda line: line["step"]), key=lambda line: line["step"])
    return {step: list(group) for step, group in groups}


def read_comparison(run: RunFolder) -> dict[str, Any] | None:
    """What `ds-higgs evaluate` left in the run's folder: the values of every column."""
    file = run.path / "evaluation" / "evaluation.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    columns = [{"name": column["name"], "values": column["values"]} for column in record["columns"]]
    return {"manifest": Path(record["manifest"]).name, "columns": columns}


def describe_manifest(run: RunFolder, key: str) -> dict[str, Any] | None:
    """Samples, speakers and text lengths of a manifest; None where it is not there (any more)."""
    entries = read_entries(run, key)
    if not entries:
        return None
    lengths = [len(spoken_text(entry.data)) for entry in entries.values()]
    speakers = Counter(str(entry.data["speaker"]) for entry in entries.values() if entry.data.get("speaker"))
    return {
        "file": Path(run.config["data"][key]).name,
        "samples": len(entries),
        "speakers": speakers.most_common(MAX_LISTED),
        "num_speakers": len(speakers),
        "text_mean": mean(lengths),
        "text_max": max(lengths),
        "text_histogram": histogram(lengths),
    }


def read_entries(run: RunFolder, key: str) -> dict[str, Entry]:
    """The readable samples of one of the run's manifests, by name ("val.json:3"); none where it is gone."""
    path = run.config.get("data", {}).get(key)
    if path is None or not Path(path).is_file():
        return {}
    try:
        entries = list(read_manifest(Path(path)))
    except UserError:  # changed since the run
        return {}
    return {sample_id(Path(path), entry.number): entry for entry in entries if _is_sample(entry)}


def _is_sample(entry: Entry) -> bool:
    if entry.error is not None or not isinstance(entry.data, dict):
        return False
    try:
        spoken_text(entry.data)
    except (KeyError, TypeError, ValueError, AttributeError):  # not a ChatML sample: the run left it out
        return False
    return True


def histogram(values: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, how many) of equal bins over the values' range; `to` is inside only in the last."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // HISTOGRAM_BINS))
    counts = Counter((value - low) // width for value in values)
    bins = range((high - low) // width + 1)
    return [(low + number * width, low + (number + 1) * width - 1, counts[number]) for number in bins]


def find_trouble(run: RunFolder) -> dict[str, Any]:
    """What went wrong: samples left out, resumes, steps without an update, failures."""
    rejected = _read_lines(run.path / "rejected.jsonl")
    failure = run.path / FAILURE_FILE
    skipped = [line["step"] for line in run.events("step") if line.get("applied") is False]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(run.path.glob("nonfinite-step-*.json"))]
    return {
        "num_rejected": len(rejected),
        "rejected": [{"sample": row["sample"], "reasons": row["reasons"]} for row in rejected[:MAX_LISTED]],
        "resumes": [line["step"] for line in run.events("resume")],
        "skipped_steps": skipped,
        "save_errors": [{"step": line["step"], "message": line["message"]} for line in run.events("save_error")],
        "non_finite": records[:MAX_LISTED],
        "failure": failure.read_text(encoding="utf-8").strip() if failure.is_file() else None,
    }


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _flatten(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", json.dumps(value, ensure_ascii=False)
