"""What a training asks of all samples at once: lengths in the model and targets, as columns beside the samples."""

import numpy as np
import pyarrow as pa

from ds_higgs.data.sample_table import MEASURES, SAMPLE_SCHEMA, SampleTable
from ds_higgs.layout import AudioLayout


def with_measures(samples: SampleTable, frames: np.ndarray, layout: AudioLayout, source: str) -> pa.Table:
    """The samples as SAMPLE_SCHEMA.

    Args:
        samples: a few thousand, of one chunk, clips of all of them in `frames`.
        frames: [uses] code frames of each clip.
        source: the manifest's name.
    """
    columns = _measure(samples, frames, layout)
    table = samples.table.append_column("source", pa.array([source] * len(samples), pa.string()))
    for name in MEASURES:
        field = SAMPLE_SCHEMA.field(name)
        table = table.append_column(field, pa.array(columns[name], field.type))
    return table


def _measure(samples: SampleTable, frames: np.ndarray, layout: AudioLayout) -> dict[str, np.ndarray]:
    tokens, ends, supervised = _flat(samples, served=False)
    is_audio_out = tokens == layout.audio_out_token
    is_audio = is_audio_out | (tokens == layout.audio_in_token)
    learned = (is_audio_out & supervised)[is_audio]
    columns = {
        "length": _lengths(tokens, ends, samples, frames, layout),
        "text_targets": _sums(supervised & ~is_audio, ends),
        "target_frames": _sums(np.where(learned, frames, 0), samples.clip_ends),
        "checksum": np.asarray([samples.checksum(row) for row in range(len(samples))], dtype=np.uint32),
    }
    served, served_ends, _ = _flat(samples, served=True)
    if not len(served):
        nothing = np.zeros(len(samples), dtype=np.int32)
        return columns | {"served_length": nothing, "forms_differ": nothing}
    rows = range(len(samples))
    differ = [not np.array_equal(samples.tokens(row)[0], samples.tokens(row, served=True)[0]) for row in rows]
    served_length = _lengths(served, served_ends, samples, frames, layout)
    return columns | {"served_length": served_length, "forms_differ": np.asarray(differ, dtype=np.int8)}


def _flat(samples: SampleTable, *, served: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tokens, where each sample's end, and whether each is a label."""
    rows = [samples.tokens(row, served=served) for row in range(len(samples))]
    tokens = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in rows)])
    supervised = np.concatenate([np.zeros(0, np.bool_), *(supervised for _, supervised in rows)])
    return tokens, np.cumsum([len(tokens) for tokens, _ in rows], dtype=np.int64), supervised


def _lengths(
    tokens: np.ndarray, ends: np.ndarray, samples: SampleTable, frames: np.ndarray, layout: AudioLayout
) -> np.ndarray:
    return _sums(layout.count_positions(tokens, frames.astype(np.int64), samples.seconds()), ends)


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[samples] int32, of each sample's span of values."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[ends]
    return np.diff(totals, prepend=0).astype(np.int32)
