"""Self-contained HTML pages of runs: no network, no other files."""

from ds_higgs.report.blind import build_blind_test
from ds_higgs.report.page import build_report

__all__ = ["build_blind_test", "build_report"]
