"""The audio of a run for the page: MP3 inside the file, as much of it as there is room for."""

import base64
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ds_higgs.data.prompts import spoken_text
from ds_higgs.report.collect import read_entries, read_samples
from ds_higgs.report.series import SAMPLE_MEASURES
from ds_higgs.run_folder import REFERENCES, TARGETS, RunFolder
from ds_higgs.speech.judging import error_rates
from ds_higgs.speech.samples import wav_path

logger = logging.getLogger(__name__)

AUDIO_BUDGET_BYTES = 3_500_000  # of base64, for the whole page
MP3_QUALITY = 0.3  # 0 is best: about 12 kB a second at 24 kHz


def collect_players(run: RunFolder, *, budget_bytes: int) -> dict[str, Any]:
    """Prompts with their reference, their target and what was said at each step.

    Where all does not fit `budget_bytes`, steps are left out, then prompts; `left_out` counts the samples without a
    player.
    """
    rows = read_samples(run)
    numbers = sorted({row["number"] for row in rows})
    steps = sorted({row["step"] for row in rows})
    texts = {name: entry.data for name, entry in read_entries(run, "val").items()}
    prompts, left_out = [], 0
    for place, number in enumerate(numbers):
        share = budget_bytes // (len(numbers) - place)
        prompt = _collect_prompt(run, number, [row for row in rows if row["number"] == number], steps, share)
        budget_bytes -= prompt.pop("bytes")
        left_out += prompt.pop("left_out")
        data = texts.get(prompt["sample_id"])
        if data is not None:
            prompt |= {"text": spoken_text(data), "speaker": data.get("speaker")}
        prompts.append(prompt)
    return {"prompts": prompts, "left_out": left_out}


def _collect_prompt(
    run: RunFolder, number: int, rows: Sequence[dict[str, Any]], steps: Sequence[int], budget_bytes: int
) -> dict[str, Any]:
    folder = run.samples.relative_to(run.path)
    originals = {name: embed(run.sample_file(wav_path(folder / name, number))) for name in (REFERENCES, TARGETS)}
    used = sum(len(uri) for uri in originals.values() if uri)
    said = []
    left_out = 0
    by_step = {row["step"]: row for row in rows}
    players: dict[int, str | None] = {}
    for step in _most_telling_first([step for step in steps if step in by_step]):
        uri = embed(run.sample_file(by_step[step]["file"]))
        if uri and used + len(uri) > budget_bytes:
            uri, left_out = None, left_out + 1
        used += len(uri or "")
        players[step] = uri
    for step, row in sorted(by_step.items()):
        measures = {key: row[key] for key in SAMPLE_MEASURES} | error_rates([row])
        heard = row.get("heard")
        said.append(
            {
                "step": step,
                "audio": players[step],
                "stopped_by": str(row.get("stopped_by")),
                "heard": heard if isinstance(heard, str) else None,
                **measures,
            }
        )
    return {
        "number": number,
        "sample_id": rows[0]["sample_id"],
        **originals,
        "said": said,
        "bytes": used,
        "left_out": left_out,
    }


def _most_telling_first(steps: list[int]) -> list[int]:
    """The last step, the first, then those that halve the largest gaps."""
    if len(steps) <= 2:
        return steps[::-1]
    order, gaps = [len(steps) - 1, 0], [(0, len(steps) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [steps[place] for place in order]


def embed(file: Path | None) -> str | None:
    """The audio file as a data URI, MP3; None where it is missing, damaged or empty."""
    if file is None or not file.is_file():
        return None
    try:
        waveform, rate = soundfile.read(file, dtype="float32")
    except soundfile.SoundFileError as error:
        logger.warning("%s: skipped: %s", file, error)
        return None
    return embed_waveform(waveform, rate) if len(waveform) else None


def embed_waveform(waveform: np.ndarray, rate: int) -> str:
    """[samples] or [samples, channels] float32, at least one sample, as a data URI, MP3."""
    encoded = io.BytesIO()
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "VARIABLE"}
    soundfile.write(encoded, np.atleast_1d(waveform), rate, compression_level=MP3_QUALITY, **options)
    return "data:audio/mpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
