"""How codes that were made elsewhere are named where audio files are.

Such a name ends with `.npy`, or it is a row of a table's column that CODES_COLUMNS names.
"""

import os
from pathlib import Path

from ds_higgs.data.containers.opening import split_name
from ds_higgs.data.containers.tables import CODES_COLUMNS

SUFFIX = ".npy"
CODEC_KEY = "codec"  # of a sample's `misc`: the name of the codec that its codes are of


def holds_codes(path: str | Path) -> bool:
    """Whether codes are meant rather than audio, by the name."""
    name = os.fspath(path)
    inside = split_name(name)
    return name.endswith(SUFFIX) or (inside is not None and inside[1].partition("[")[0] in CODES_COLUMNS)
