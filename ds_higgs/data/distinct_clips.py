"""The distinct clips of a table of samples, by number, and which samples those are of that cannot be used."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from ds_higgs.data.clips import Clip
from ds_higgs.data.containers.opening import reading_places
from ds_higgs.data.key_index import KEY_BYTES, KeyIndex, join_keys
from ds_higgs.data.manifest import problem_at
from ds_higgs.data.problems import BadSampleError, Problem
from ds_higgs.data.sample_table import SampleTable
from ds_higgs.layout import AudioLayout


def number_distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number distinct keys in their order: [n, KEY_BYTES] uint8 -> [n] int32 numbers, [distinct] first rows."""
    encoded = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))]
    ).dictionary_encode()
    numbers = encoded.indices.to_numpy()
    return numbers, np.unique(numbers, return_index=True)[1]


class DistinctClips:
    """Numbered in the order in which samples first use them.

    keys: [clips, KEY_BYTES] uint8; seconds: [clips].
    of_use: [uses] int32, which clip each use is of.
    """

    def __init__(self, samples: SampleTable):
        self._samples = samples
        uses = samples.keys()
        self.of_use, self._first_use = number_distinct(uses)
        self.keys = uses[self._first_use]
        self.seconds = samples.seconds()[self._first_use]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Clip:
        return self._samples.clip(int(self._first_use[number]))

    def reading_places(self) -> np.ndarray | None:
        """See `containers.opening`."""
        return reading_places(self._samples.paths(), self._first_use)


def problems_of_clips(
    manifest: Path,
    samples: SampleTable,
    clips: DistinctClips,
    failures: Mapping[str, BadSampleError],
    layout: AudioLayout,
) -> list[Problem]:
    """Of the samples that have a clip that failed; failures: by key."""
    failed = KeyIndex(join_keys(map(bytes.fromhex, failures))).find(clips.keys) >= 0
    uses = np.flatnonzero(failed[clips.of_use])
    problems = []
    for row in np.unique(np.searchsorted(samples.clip_ends, uses, side="right")).tolist():
        found = zip(samples.clips(row), samples.audio_targets(row, layout), strict=True)
        errors = [failures[clip.key].of(clip.name(learned=on)) for clip, on in found if clip.key in failures]
        number = samples.value("number", row)
        problems += [problem_at(manifest, number, error.message, error.expected) for error in errors]
    return list(dict.fromkeys(problems))
