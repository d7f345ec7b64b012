"""Everything that the page tells about one run, as plain values for its script."""

import contextlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from ds_higgs.adapters.record import LOSSES
from ds_higgs.data.manifest import Entry, read_manifest, sample_id
from ds_higgs.data.prompts import spoken_text
from ds_higgs.errors import UserError
from ds_higgs.report.series import EVAL_CURVES, SAMPLE_CURVES, SAMPLE_MEASURES, STEP_CURVES, finite, read_curve
from ds_higgs.run_folder import EVALUATION_FILE, RunFolder
from ds_higgs.speech.in_training import summarise_rows
from ds_higgs.speech.judging import ERROR_RATES

logger = logging.getLogger(__name__)

MAX_LISTED = 50
_ERROR_COUNT = {"edits": int, "length": int}
HISTOGRAM_BINS = 12


def collect_run(run: RunFolder) -> dict[str, Any]:
    """The values of one run, all but its audio."""
    return {
        "name": run.name,
        "path": str(run.path),
        "summary": summarise(run),
        "curves": collect_curves(run),
        "evaluations": read_evaluations(run),
        "comparison": read_comparison(run),
        "data": {key: describe_manifests(run, key) for key in ("train", "val")},
        "trouble": find_trouble(run),
        "config": yaml.safe_dump(run.config_values, sort_keys=False, allow_unicode=True),
        "settings": dict(_flatten(run.config_values)),
    }


def summarise(run: RunFolder) -> dict[str, Any]:
    """The numbers at the top of the page."""
    steps, ends = run.events("step"), run.events("end")
    audio_losses = _numbers(run.events("eval"), "audio_loss")
    return {
        "status": str(ends[-1].get("reason")) if ends else "not ended",
        "steps": run.last_step,
        "epochs": max(_numbers(steps, "epoch"), default=0),
        "samples": sum(_numbers(steps, "num_samples")),
        "tokens": sum(_numbers(steps, "num_tokens")),
        "audio_targets": sum(_numbers(steps, "num_audio_targets")),
        "seconds": sum(_numbers(steps, "step_time_s")),
        "tokens_per_second": median(_numbers(steps, "tokens_per_second") or [0.0]) if steps else None,
        "peak_memory_gib": max(_numbers(steps, "peak_memory_gib"), default=None),
        "first_audio_loss": audio_losses[0] if audio_losses else None,
        "best_audio_loss": min(audio_losses, default=None),
        "last_audio_loss": audio_losses[-1] if audio_losses else None,
    }


def _numbers(lines: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """The finite numbers that `lines` hold at `key`."""
    return [line[key] for line in lines if finite(line.get(key)) is not None]


def collect_curves(run: RunFolder) -> dict[str, list]:
    """Curves by name: "train/loss", "val/audio_loss", "val/codebook_3", "samples/stop_rate" and so on."""
    steps, evals = run.events("step"), run.events("eval")
    curves = {f"train/{key}": read_curve(steps, key) for key in STEP_CURVES}
    curves |= {f"val/{key}": read_curve(evals, key) for key in EVAL_CURVES}
    for name, lines in (("train", steps), ("val", evals)):
        num_codebooks = max((len(_codebooks(line)) for line in lines), default=0)
        for index in range(num_codebooks):
            curves[f"{name}/codebook_{index}"] = read_curve(lines, "audio_loss_per_codebook", index)
        curves |= _curves_of_sources(name, lines)
    spoken = _by_step(read_samples(run))
    rows = [{"step": step, **summarise_rows(lines)} for step, lines in spoken.items()]
    curves |= {f"samples/{key}": read_curve(rows, key) for key in SAMPLE_CURVES}
    return {name: points for name, points in curves.items() if points}


def _curves_of_sources(what: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Of a mixture's sources, or of several validation manifests: "train/audio_loss/NAME" and so on."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        sources = line.get("sources")
        for name, values in sources.items() if isinstance(sources, dict) else ():
            if isinstance(values, dict):
                rows.setdefault(str(name), []).append({**values, "step": line["step"]})
    keys = ("audio_loss", "text_loss")
    return {f"{what}/{key}/{name}": read_curve(of_source, key) for name, of_source in rows.items() for key in keys}


def _by_step(lines: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    groups = itertools.groupby(sorted(lines, key=lambda line: line["step"]), key=lambda line: line["step"])
    return {step: list(group) for step, group in groups}


def read_samples(run: RunFolder) -> list[dict[str, Any]]:
    """The spoken samples whose lines say which they are and where; a measure that is no number is None.

    Of errors only those are there that can be counted.
    """
    kinds = {"number": int, "sample_id": str, "file": str}
    rows = [row for row in run.events("sample") if all(isinstance(row.get(key), kind) for key, kind in kinds.items())]
    plain = ({key: value for key, value in row.items() if key not in ERROR_RATES or _is_count(value)} for row in rows)
    return [row | {key: finite(row.get(key)) for key in SAMPLE_MEASURES} for row in plain]


def _is_count(errors: Any) -> bool:
    return isinstance(errors, dict) and {key: type(value) for key, value in errors.items()} == _ERROR_COUNT


def read_evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """The validation losses, step by step."""
    return [
        {
            "step": line["step"],
            **{key: finite(line.get(key)) for key in LOSSES},
            "audio_loss_per_codebook": [finite(value) for value in _codebooks(line)],
        }
        for line in run.events("eval")
    ]


def _codebooks(line: Mapping[str, Any]) -> list[Any]:
    losses = line.get("audio_loss_per_codebook")
    return losses if isinstance(losses, list) else []


def read_comparison(run: RunFolder) -> dict[str, Any] | None:
    """What `ds-higgs evaluate` left in the run's folder: the values of every column; None where that is damaged.

    Of all steps, with the intervals of every column and which one to take.
    """
    record = run.read_evaluation()
    if record is None:
        return None
    try:
        columns = [
            {
                "name": str(column["name"]),
                "values": {key: finite(value) for key, value in column["values"].items()},
                "intervals": {key: [finite(low), finite(high)] for key, (low, high) in column["intervals"].items()}
                if "intervals" in column
                else {},
            }
            for column in record["columns"]
        ]
        choice = _read_choice(record["choice"]) if "choice" in record else None
        return {"manifest": Path(record["manifest"]).name, "columns": columns, "choice": choice}
    except (KeyError, TypeError, ValueError, AttributeError):
        logger.warning("%s: skipped: not what ds-higgs wrote there", run.evaluation / EVALUATION_FILE)
        return None


def _read_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "by": str(choice["by"]),
        "name": str(choice["name"]),
        "value": finite(choice["value"]),
        "num_samples": int(choice["num_samples"]),
        "undecided": [
            {"name": str(one["name"]), **{key: finite(one[key]) for key in ("difference", "low", "high")}}
            for one in choice["against"]
            if not one["decided"]
        ],
    }


def describe_manifests(run: RunFolder, key: str) -> dict[str, Any] | None:
    """Samples, speakers and text lengths of all manifests of `key`; None where none is there (any more)."""
    manifests, entries = _manifests_of(run, key), list(_entries_of(run, key))
    if not entries:
        return None
    lengths = [len(spoken_text(entry.data)) for _, entry in entries]
    speakers = Counter(str(entry.data["speaker"]) for _, entry in entries if entry.data.get("speaker"))
    return {
        "file": ", ".join(manifest.name for manifest in manifests),
        "samples": len(entries),
        "speakers": speakers.most_common(MAX_LISTED),
        "num_speakers": len(speakers),
        "text_mean": mean(lengths),
        "text_max": max(lengths),
        "text_histogram": histogram(lengths),
    }


def read_entries(run: RunFolder, key: str) -> dict[str, Entry]:
    """The readable samples of the run's manifests for `key` ("train", "val"), by name ("val.json:3")."""
    return {sample_id(manifest, entry.number): entry for manifest, entry in _entries_of(run, key)}


def _entries_of(run: RunFolder, key: str) -> Iterator[tuple[Path, Entry]]:
    """None of a manifest that is gone, or has changed so that it cannot be read."""
    for manifest in _manifests_of(run, key):
        if manifest.is_file():
            with contextlib.suppress(UserError):
                yield from [(manifest, entry) for entry in read_manifest(manifest) if _is_sample(entry)]


def _manifests_of(run: RunFolder, key: str) -> list[Path]:
    """Those that config.yaml names, in whichever form."""
    data = run.config_values.get("data")
    if not isinstance(data, dict):
        return []
    sources = data.get(key)
    named = [source.get("manifest") for source in sources if isinstance(source, dict)] if sources else []
    return [Path(path) for path in (data.get(f"{key}_manifest"), *named) if isinstance(path, str)]


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
    rejected = run.rejected()
    skipped = [line["step"] for line in run.events("step") if line.get("applied") is False]
    save_errors = run.events("save_error")
    return {
        "num_rejected": len(rejected),
        "rejected": [{"sample": str(row.get("sample")), "reasons": row["reasons"]} for row in rejected[:MAX_LISTED]],
        "resumes": [line["step"] for line in run.events("resume")],
        "skipped_steps": skipped,
        "save_errors": [{"step": line["step"], "message": str(line.get("message"))} for line in save_errors],
        "non_finite": [describe_non_finite(record) for record in run.nonfinite_records()[:MAX_LISTED]],
        "failure": _read_text(run.failure_file),
        "mended_failure": _read_text(run.mended_failure_file),
    }


def describe_non_finite(record: Mapping[str, Any]) -> str:
    """One line of what a rank wrote down of a step that was not finite."""
    groups = record.get("samples")
    groups = groups if isinstance(groups, list) else []
    samples = ", ".join(str(sample) for group in groups for sample in (group if isinstance(group, list) else [group]))
    return (
        f"Step {record.get('step')}, rank {record.get('rank')}: loss {record.get('loss')}, "
        f"gradient norm {record.get('grad_norm')}; samples {samples or 'not known'}"
    )


def _read_text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None


def _flatten(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", json.dumps(value, ensure_ascii=False)
