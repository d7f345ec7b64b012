"""One self-contained HTML page of a run, or of several side by side: no network, no other files."""

from ds_higgs.report.page import build_report

__all__ = ["build_report"]
