"""Runs the cases of a worker on every rank."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_higgs.job import distributed


def run_cases(names: Mapping[str, Any]) -> None:
    """Call those of `names` that the command line has: CASE[,CASE] FOLDER STAGE PRECISION; each has its folder."""
    cases, folder, stage, precision = sys.argv[1:]
    distributed.init_process_group()
    for case in cases.split(","):
        names[case](Path(folder) / case, int(stage), precision)
    distributed.destroy_process_group()
