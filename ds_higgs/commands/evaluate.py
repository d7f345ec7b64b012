"""Checkpoints against their base without adapter: losses and what can be heard, in one table."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_higgs.adapters.record import LOSSES
from ds_higgs.batch import Batch
from ds_higgs.commands.generate import SpeechOptions, VoiceOptions, load_voice
from ds_higgs.commands.voice import Voice
from ds_higgs.config import LossConfig
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.prompts import add_texts, choose_prompts
from ds_higgs.errors import UserError
from ds_higgs.files import write_json
from ds_higgs.job.answers import print_answer
from ds_higgs.losses import Targets
from ds_higgs.run_folder import EVALUATION_FILE
from ds_higgs.speech.endings import count_endings
from ds_higgs.speech.judging import Judges, error_rates
from ds_higgs.speech.measures import average
from ds_higgs.speech.samples import Synthesizer, speak_all
from ds_higgs.training.metrics import json_values
from ds_higgs.training.step_module import StepModule, TargetScores
from ds_higgs.training.stop_and_onset import Landmarks, known_averages
from ds_higgs.training.validation import build_loss_weights, sum_scores, summarise_scores

logger = logging.getLogger(__name__)

BASE = "base"
# What the table shows, in this order: key, heading, and whether more is better (None: nearer to 1 is).
MEASURES: tuple[tuple[str, str, bool | None], ...] = (
    ("loss", "loss", False),
    ("text_loss", "text loss", False),
    ("audio_loss", "audio loss", False),
    ("eos_probability", "P(EOS) at the true end", True),
    ("false_eos_rate", "EOS likeliest before it", False),
    ("onset_audio_loss", "audio loss, first 2 s", False),
    ("later_audio_loss", "audio loss, the rest", False),
    ("words_loss", "text loss, words", False),
    ("audio_start_loss", "text loss, <|audio_out_bos|>", False),
    ("end_tokens_loss", "text loss, end tokens", False),
    ("kept_loss", "loss on what is to stay", False),
    ("kept_text_loss", "text loss on it", False),
    ("kept_audio_loss", "audio loss on it", False),
    ("forgotten", "its loss over the base's", False),
    ("code_accuracy", "code accuracy", True),
    ("never_ending", "never ended, samples", False),
    ("early_ending", "ended early, samples", False),
    ("repeating", "repeat themselves, samples", False),
    ("stop_rate", "stop rate", True),
    ("duration_ratio", "duration ratio", None),
    ("silence_share", "silence share", False),
    ("mel_cepstral_distance", "mel-cepstral distance, dB", False),
    ("word_error_rate", "word error rate", False),
    ("character_error_rate", "character error rate", False),
    ("speaker_similarity", "speaker similarity", True),
)
_NO_AVERAGE = ("number", "seconds", "repeats")


@dataclass(frozen=True)
class Evaluation:
    """One column of the table: averages over all samples, and the samples themselves."""

    name: str
    values: dict[str, float]
    samples: list[dict[str, Any]]


def compare(
    columns: dict[str, VoiceOptions],
    manifest: Path,
    out: Path,
    *,
    speech: SpeechOptions,
    count: int,
    batch_size: int,
    judges: Judges,
    keep: Path | None = None,
) -> list[Evaluation]:
    """Evaluate every model of `columns` on `manifest`; WAVs, and all numbers as evaluation.json, go to `out`.

    Args:
        columns: by name.
        count: samples to speak; the losses are over the whole manifest.
        keep: a manifest of what is to stay as it was (other voices, text alone), for losses against the base.

    Raises:
        UserError: for what is missing or does not fit.
    """
    judges.load()  # one that is missing is told before losses are computed for an hour
    evaluations = []
    for name, options in columns.items():
        voice, loss = load_voice(options)
        dataset = voice.read_manifest(manifest)
        values = compute_losses(voice, dataset, loss, batch_size=batch_size)
        values["num_samples"] = len(dataset)
        samples = listen(voice, dataset, out, name=name, speech=speech, count=count, judges=judges)
        if keep is not None:
            values |= compute_kept_losses(voice, keep, loss, batch_size=batch_size)
        evaluations.append(Evaluation(name, values | summarise_samples(samples), samples))
    _warn_of_other_samples(evaluations)
    compare_kept_losses(evaluations)
    out.mkdir(parents=True, exist_ok=True)
    record = {"manifest": str(manifest), "columns": [vars(evaluation) for evaluation in evaluations]}
    write_json(out / EVALUATION_FILE, json_values(record))
    return evaluations


def _warn_of_other_samples(evaluations: Sequence[Evaluation]) -> None:
    counts = {one.name: int(one.values["num_samples"]) for one in evaluations}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        logger.warning("the columns are not of the same samples, because their runs leave others out: %s", listed)


def compute_kept_losses(voice: Voice, manifest: Path, loss: LossConfig, *, batch_size: int) -> dict[str, float]:
    """The losses on what is to stay as it was, each where the manifest has something for it."""
    dataset = voice.read_manifest(manifest, needs_audio=False)
    values = compute_losses(voice, dataset, loss, batch_size=batch_size)
    has_audio = "onset_audio_loss" in values
    return {f"kept_{name}": values[name] for name in LOSSES if has_audio or name != "audio_loss"}


def compare_kept_losses(evaluations: Sequence[Evaluation]) -> None:
    """Put into every column how much more it loses than the base on what is to stay."""
    kept = {one.name: one.values["kept_loss"] for one in evaluations if "kept_loss" in one.values}
    for one in evaluations:
        if one.name in kept and BASE in kept:
            one.values["forgotten"] = kept[one.name] - kept[BASE]


@torch.no_grad()
def compute_losses(
    voice: Voice,
    dataset: HiggsDataset,
    loss: LossConfig,
    *,
    batch_size: int,
    each: Callable[[Batch, Targets, TargetScores], None] = lambda batch, targets, scores: None,
) -> dict[str, float]:
    """The losses over a whole data set and what is known of its ends, as validation in the training computes them.

    Args:
        each: told every micro-batch, with its targets on the CPU.
    """
    num_codebooks = voice.rules.layout.num_codebooks
    module = StepModule(voice.model)
    totals = sum_scores(
        module,
        _batches(voice, dataset, batch_size),
        num_codebooks=num_codebooks,
        placeholder_ids=module.placeholder_ids,
        device=voice.model.device,
        landmarks=Landmarks.of(voice.rules),
        each=each,
    )
    found = summarise_scores(totals, build_loss_weights(loss, num_codebooks=num_codebooks))
    losses = {name: getattr(found.losses, name) for name in LOSSES}
    return losses | known_averages(found.values())


def _batches(voice: Voice, dataset: HiggsDataset, batch_size: int) -> Iterator[Batch]:
    order = np.argsort(dataset.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        indices = [int(index) for index in order[start : start + batch_size]]
        yield voice.collator([dataset[index] for index in indices], [dataset.sample_id(index) for index in indices])


def listen(
    voice: Voice, dataset: HiggsDataset, out: Path, *, name: str, speech: SpeechOptions, count: int, judges: Judges
) -> list[dict[str, Any]]:
    """Speak and measure up to `count` samples; a row for each, its `file` relative to `out`."""
    items = choose_prompts(dataset, voice.collator, count=count)
    if judges.transcriber is not None:
        items = add_texts(items, dataset.manifest)
    synthesizer = Synthesizer(voice.codec, sampling=speech.sampling, seed=speech.seed, max_seconds=speech.max_seconds)
    synthesizer.save_originals(out, items)
    rows = speak_all(voice.model, items, synthesizer, out / name, judges=judges)
    return [{**row, "file": str(Path(row["file"]).relative_to(out))} for row in rows]


def summarise_samples(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Averages of what was heard; error rates are over all words and characters."""
    plain = [
        {key: value for key, value in row.items() if isinstance(value, int | float) and key not in _NO_AVERAGE}
        | {"stop_rate": row["stopped_by"] == "eos"}
        for row in rows
    ]
    return average(plain) | error_rates(rows) | count_endings(rows)


def format_table(evaluations: Sequence[Evaluation], write: Callable[[str], object] = print_answer) -> None:
    """Write the table: one row a measure, one column a model, an arrow for the better direction."""
    arrows = {True: "(higher is better)", False: "(lower is better)", None: "(1 is best)"}
    shown = [one for one in MEASURES if any(one[0] in evaluation.values for evaluation in evaluations)]
    headings = [f"{heading} {arrows[better]}" for _, heading, better in shown]
    first = max(map(len, headings), default=0)
    widths = [max(len(evaluation.name), 10) for evaluation in evaluations]
    names = (f"{one.name:>{width}}" for one, width in zip(evaluations, widths, strict=True))
    write(" " * first + "  " + "  ".join(names))
    for heading, (key, _, _) in zip(headings, shown, strict=True):
        cells = (f"{_cell(one.values.get(key)):>{width}}" for one, width in zip(evaluations, widths, strict=True))
        write(f"{heading:<{first}}  " + "  ".join(cells))


def describe_endings(evaluations: Sequence[Evaluation]) -> list[str]:
    """A line for every model that does not end as the recordings do, or repeats itself."""
    names = {"never_ending": "never ended", "early_ending": "ended early", "repeating": "repeat themselves"}
    lines = []
    for one in evaluations:
        found = [f"{one.values[key]:.0f} {name}" for key, name in names.items() if one.values[key]]
        if found:
            lines.append(f"{one.name}: of {one.values['num_spoken']:.0f} samples spoken, {', '.join(found)}")
    return lines


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def build_columns(
    sources: Sequence[Path],
    *,
    base: str | None,
    step: int | None,
    with_base: bool,
    scales: Sequence[float] = (1.0,),
    **options: Any,
) -> dict[str, VoiceOptions]:
    """A column for every source, named after it, with that of the base before them.

    Args:
        scales: of the adapters; for each one a column, named like "run@0.5".

    Raises:
        UserError: where there is nothing to evaluate.
    """
    columns = {}
    if with_base:
        if base is None and not sources:
            raise UserError("nothing to evaluate: expected a run, a checkpoint or an adapter, or --base")
        columns[BASE] = VoiceOptions(base=base, read_as=sources[0] if sources else None, step=step, **options)
    for source in sources:
        name = source.resolve().name
        while any(taken.split("@")[0] == name for taken in columns):
            name += "'"
        for scale in scales:
            column = name if scale == 1 else f"{name}@{scale:g}"
            columns[column] = VoiceOptions(base=base, adapter=source, step=step, lora_scale=scale, **options)
    return columns
