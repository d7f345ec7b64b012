"""What takes long is told, what takes a moment is not, and libraries' bars are not."""

import logging
import time

import pytest
from transformers.utils import logging as transformers_logging

from ds_higgs.job import logs
from ds_higgs.job.logs import VERBOSE, phase, without_bars
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


@pytest.mark.parametrize("verbose", [False, True])
def test_bars_of_transformers_are_shown_where_all_is_to_be_said(verbose, monkeypatch, capfd):
    monkeypatch.setenv(VERBOSE, str(int(verbose)))
    with without_bars():
        list(transformers_logging.tqdm(range(2), desc="Loading checkpoint shards"))
    assert ("Loading checkpoint shards" in capfd.readouterr().err) == verbose
    assert transformers_logging.is_progress_bar_enabled()
