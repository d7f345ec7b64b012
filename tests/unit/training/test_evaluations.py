"""A stop before, during and after what the model says: nothing is recorded of what was not said to the end."""

from types import SimpleNamespace

import pytest

from ds_higgs.files import read_json_lines
from ds_higgs.job.stopping import StopRequests
from ds_higgs.training.evaluations import Evaluations
from ds_higgs.training.metrics import MetricsFile

ROW = {"prompt": 0, "audio": "", "seconds": 1.0, "stopped_by": "eos"}


class Prompts:
    """Speaks three rows, and is asked to stop after some."""

    def __init__(self, run_dir, stop_requests, stop_after):
        self.run_dir = run_dir
        self.stop_requests = stop_requests
        self.stop_after = stop_after
        self.spoken = 0
        self.is_asked = False

    def listen(self, model, step, stop):
        self.is_asked = True
        while self.spoken < 3 and not stop():
            self.spoken += 1
            if self.spoken == self.stop_after:
                self.stop_requests.reason = "SIGTERM"
        return [ROW] * self.spoken


@pytest.mark.parametrize(("stop_after", "spoken", "recorded"), [(0, 0, 0), (2, 2, 0), (None, 3, 3)])
def test_a_stop_ends_speaking_and_it_stays_due(tmp_path, stop_after, spoken, recorded):
    stop_requests = StopRequests()
    prompts = Prompts(tmp_path, stop_requests, stop_after)
    if stop_after == 0:
        stop_requests.reason = "SIGTERM"
    evaluations = Evaluations(
        engine=SimpleNamespace(
            module=SimpleNamespace(higgs=None),
            monitor=SimpleNamespace(enabled=False, tb_monitor=None),
            zero_optimization_stage=lambda: 2,
        ),
        validation_sets=(),
        listener=prompts,
        weights=None,
        landmarks=None,
        max_batches=None,
        metrics=MetricsFile(tmp_path / "metrics.jsonl", enabled=True),
        stop_requests=stop_requests,
        keep_best=lambda values: None,
    )
    position = SimpleNamespace(step=7, validation_due=False, listening_due=True)
    evaluations.make(position)
    assert (prompts.is_asked, prompts.spoken) == (stop_after != 0, spoken)
    assert position.listening_due == (recorded == 0)
    assert [row["event"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == ["sample"] * recorded + [
        "listening"
    ] * bool(recorded)
