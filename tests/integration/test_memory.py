"""The estimate of whole weights' training against the bytes that DeepSpeed's steps take, on two ranks."""

from pathlib import Path

import pytest

from ds_higgs.model.tiny import write_tiny_base
from tests.support import launching

WORKER = Path(__file__).with_name("workers") / "memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", ["audio_path", "full"])
def test_the_estimate_is_within_five_per_cent_of_counted_bytes(tmp_path, mode, stage):
    write_tiny_base(tmp_path / "base", hidden_size=256, num_layers=8, intermediate_size=1024)  # heads: a small part
    done = launching.run_ranks(2, WORKER, tmp_path / "base", mode, str(stage))
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
