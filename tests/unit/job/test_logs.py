"""What takes long is told, what takes a moment is not."""

import logging
import time

from ds_higgs.job import logs
from ds_higgs.job.logs import phase
from tests.support.patience import HANG_S


def test_only_a_long_phase_is_told(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="ds_higgs")
    with phase("a moment"):
        pass
    monkeypatch.setattr(logs, "PHASE_SECONDS", 0.01)
    with phase("loading the base checkpoint"):
        deadline = time.monotonic() + HANG_S
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.005)
    assert caplog.messages == ["loading the base checkpoint ..."]
