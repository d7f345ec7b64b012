"""The distinct clips of a table of samples, by number."""

import numpy as np
import pyarrow as pa

from ds_higgs.data.clips import Clip
from ds_higgs.data.key_index import KEY_BYTES
from ds_higgs.data.sample_table import SampleTable


class DistinctClips:
    """Numbered in the order in which samples first use them.

    keys: [clips, KEY_BYTES] uint8; seconds: [clips].
    of_use: [uses] int32, which clip each use is of.
    """

    def __init__(self, samples: SampleTable):
        self._samples = samples
        uses = samples.keys()
        encoded = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(KEY_BYTES), len(uses), [None, pa.py_buffer(np.ascontiguousarray(uses))]
        ).dictionary_encode()
        self.of_use = encoded.indices.to_numpy()
        _, self._first_use = np.unique(self.of_use, return_index=True)
        self.keys = uses[self._first_use]
        self.seconds = samples.seconds()[self._first_use]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Clip:
        return self._samples.clip(int(self._first_use[number]))
