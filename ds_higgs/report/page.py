"""Puts values, styles and script together into one HTML file that loads nothing."""

import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ds_higgs import __version__
from ds_higgs.commands.evaluate import MEASURES
from ds_higgs.errors import UserError
from ds_higgs.report.collect import collect_run
from ds_higgs.report.players import AUDIO_BUDGET_BYTES, collect_players
from ds_higgs.run_folder import RunFolder

# Nothing is fetched: the browser refuses it, whatever is in the data.
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; media-src data:"

SCRIPTS = ("elements.js", "charts.js", "sections.js")


def build_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the page of one run, or of several side by side, to the file `out`.

    Raises:
        UserError: if a folder holds no run.
    """
    runs = [RunFolder.open(path) for path in run_dirs]
    collected = []
    for run in runs:
        players = collect_players(run, budget_bytes=AUDIO_BUDGET_BYTES // len(runs))
        collected.append({**collect_run(run), "players": players})
    _make_names_differ(collected)
    values = {
        "runs": collected,
        "measures": [{"key": key, "label": label, "better": better} for key, label, better in MEASURES],
    }
    title = " · ".join(run["name"] for run in collected)
    write_page(out, render(values, title=title, scripts=SCRIPTS))


def write_page(out: Path, page: str) -> None:
    """Write a page to the file `out`. Raises UserError where it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error


def render(values: dict[str, Any], *, title: str, scripts: Sequence[str]) -> str:
    """The page around `values`, which its scripts read, with this version and the time added."""
    assets = files("ds_higgs.report")
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    parts = {
        "policy": escape(CONTENT_POLICY),
        "title": escape(f"{title} – ds_higgs"),
        "style": (assets / "style.css").read_text(encoding="utf-8"),
        "values": _script_json({**values, "version": __version__, "made": made}),
        "script": "".join((assets / name).read_text(encoding="utf-8") for name in scripts),
    }
    page = (assets / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda placeholder: parts[placeholder[1]], page)


def _script_json(values: Any) -> str:
    """JSON that cannot end the script element around it."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _make_names_differ(runs: Sequence[dict[str, Any]]) -> None:
    """Folders of the same name get their parent's before it."""
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            path = Path(run["path"]).resolve()
            run["name"] = f"{path.parent.name}/{path.name}"
