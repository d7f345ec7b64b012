"""The page of `ds-higgs report --blind`: what two models said to the same prompts, without names, to be voted on."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_higgs.data.prompts import spoken_text
from ds_higgs.errors import UserError
from ds_higgs.report.collect import read_entries
from ds_higgs.report.page import render, write_page
from ds_higgs.report.players import embed
from ds_higgs.run_folder import EVALUATION_FILE, REFERENCES, RunFolder
from ds_higgs.speech.samples import wav_path

logger = logging.getLogger(__name__)

AUDIO_BUDGET_BYTES = 30_000_000  # of base64
SCRIPTS = ("elements.js", "blind.js")


def build_blind_test(
    run_dir: Path, out: Path, *, columns: Sequence[str] | None = None, audio_bytes: int = AUDIO_BUDGET_BYTES
) -> int:
    """Write the page of a run's evaluation to the file `out`.

    Which of the two is played on which side is drawn by the browser, for everybody who listens.

    Args:
        columns: the two models, by the names that the evaluation gives them; None: the first and the last.
        audio_bytes: room for players.

    Returns:
        the number of pairs on the page.

    Raises:
        UserError: there is no evaluation with two models that said something to the same prompts.
    """
    run = RunFolder.open(run_dir)
    models = _choose(_read_models(run), columns, run.evaluation / EVALUATION_FILE)
    pairs = _collect_pairs(run, models, audio_bytes)
    if not pairs:
        raise UserError(f"{run.evaluation}: {' and '.join(models)} said nothing to the same prompt that is still there")
    values = {"run": run.name, "models": list(models), "pairs": pairs}
    write_page(out, render(values, title=f"{run.name}, blind", scripts=SCRIPTS))
    return len(pairs)


def _read_models(run: RunFolder) -> dict[str, dict[int, dict[str, Any]]]:
    """Of each model, by name: what it said, by the prompt's number."""
    file = run.evaluation / EVALUATION_FILE
    record = run.read_evaluation()
    if record is None:
        raise UserError(f"{file}: no evaluation to listen to; make one with: ds-higgs evaluate {run.path}")
    try:
        return {
            str(column["name"]): {int(row["number"]): dict(row) for row in column["samples"]}
            for column in record["columns"]
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file}: not what ds-higgs wrote there; make it anew with ds-higgs evaluate") from None


def _choose(
    models: Mapping[str, dict[int, dict[str, Any]]], columns: Sequence[str] | None, file: Path
) -> dict[str, dict[int, dict[str, Any]]]:
    names = list(models)
    chosen = list(columns) if columns is not None else [names[0], names[-1]] if len(names) > 1 else []
    if len(set(chosen)) != 2 or not set(chosen) <= set(names):
        wanted = f"--columns {','.join(columns)}" if columns is not None else "a blind test"
        raise UserError(f"{file}: {wanted}: expected two of its models; found {', '.join(names) or 'none'}")
    return {name: models[name] for name in chosen}


def _collect_pairs(
    run: RunFolder, models: Mapping[str, dict[int, dict[str, Any]]], audio_bytes: int
) -> list[dict[str, Any]]:
    first, second = models.values()
    entries = read_entries(run, "val")
    pairs = []
    for number in sorted(first.keys() & second.keys()):
        said = [embed(run.evaluation_file(str(rows[number].get("file")))) for rows in (first, second)]
        reference = embed(run.evaluation_file(wav_path(Path(REFERENCES), number)))
        audio_bytes -= sum(len(uri) for uri in (*said, reference) if uri)
        if audio_bytes < 0:
            logger.warning("the page is full: prompts from number %d on are left out", number)
            break
        if None not in said:
            entry = entries.get(str(first[number].get("sample_id")))
            text = first[number].get("text") or (entry and spoken_text(entry.data)) or ""
            pairs.append({"number": number, "text": str(text), "said": said, "reference": reference})
    return pairs
