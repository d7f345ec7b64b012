"""Every byte of a prepared set and of its codes against the checksums: what a training verifies as it reads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ds_higgs.data.arrow_files import suspect
from ds_higgs.data.clip_files import ClipFile
from ds_higgs.data.prepared import PreparedSet


def find_damage(prepared: PreparedSet, codes: Path) -> Iterator[tuple[Path, str]]:
    """Files that hold something damaged, and what; the next preparation makes that part again, and no other.

    Args:
        codes: folder of the code cache.
    """
    damaged = sum(not prepared.is_intact(row) for row in range(len(prepared.samples)))
    if damaged:
        prepared.suspect()
        yield prepared.folder / "samples", f"{damaged} of {len(prepared.samples)} samples fail their checksum"
    places = prepared.places
    for number, name in enumerate(places.names):
        rows = np.unique(places.row[places.file == number]).tolist()
        file = ClipFile(codes / name)
        damaged = sum(file.read(row) is None for row in rows)
        if damaged:
            suspect(codes / name)
            yield codes / name, f"{damaged} of {len(rows)} clips fail their checksum"
