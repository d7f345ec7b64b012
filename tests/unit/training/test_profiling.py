"""`logging.profile_steps`: a trace that other programs read, of so many steps; the run itself stays as it is."""

import gzip
import json

import torch

from ds_higgs.training.profiling import profiling


def test_the_steps_that_were_asked_for_are_traced(tmp_path):
    with profiling(tmp_path / "profile", steps=2) as step_done:
        for size in range(1, 6):  # the third and the fourth are traced
            torch.ones(size, 7) @ torch.ones(7, size)
            step_done()
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::matmul"]
    assert len(products) == 2
    assert "aten::mm" in (tmp_path / "profile" / "operations.txt").read_text()


def test_none_is_none(tmp_path):
    with profiling(tmp_path / "profile", steps=0) as step_done:
        step_done()
    assert not (tmp_path / "profile").exists()
