"""Clips copied from one code cache to another, every one of them verified on the way."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from ds_higgs.data.arrow_files import bytes_matrix
from ds_higgs.data.cache import CodeCache
from ds_higgs.data.key_index import KEY_BYTES, KeyIndex


def copy_clips(source: CodeCache, target: CodeCache, keys: np.ndarray) -> None:
    """Copy of `keys`, [n, KEY_BYTES] uint8, what the target lacks and the source has; damaged clips are left out.

    Raises:
        UserError: the target cannot be written.
    """
    source.scan()
    target.scan()
    absent = keys[target.find(keys) < 0]
    wanted = KeyIndex(absent[source.find(absent) >= 0])
    if len(wanted):
        target.add_batches(_chosen(source.intact_batches(), wanted))
        target.scan()


def _chosen(batches: Iterator[pa.RecordBatch], wanted: KeyIndex) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch.filter(pa.array(wanted.find(bytes_matrix([batch.column("key")], KEY_BYTES)) >= 0))
