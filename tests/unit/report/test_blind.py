"""The page of `ds-higgs report --blind`: what is compared, what is refused, and votes in a real browser."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from ds_higgs.cli.main import main, run
from ds_higgs.errors import UserError
from ds_higgs.report import build_blind_test
from tests.support.browser import CHROMIUM, Browser

RATE = 24_000
NUM_PAIRS = 11
ARABIC = "صباح الخير يا أصدقائي، كيف حالكم اليوم؟"


def write_wav(file: Path, pitch: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * pitch * np.arange(RATE // 4) / RATE), RATE)


@pytest.fixture
def evaluated(tmp_path: Path, example_dir: Path) -> Path:
    """A run whose evaluation has three models; they said the same number of things."""
    folder = tmp_path / "voice"
    folder.mkdir()
    data = {
        key: str(example_dir / f"{key.removesuffix('_manifest')}.json") for key in ("train_manifest", "val_manifest")
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    (folder / "metrics.jsonl").write_text("")
    columns = []
    for place, name in enumerate(("base", "early", "late")):
        rows = []
        for number in range(NUM_PAIRS):
            file = f"{name}/{number:03d}.wav"
            write_wav(folder / "evaluation" / file, 200 + 100 * place + number)
            rows.append({"number": number, "sample_id": f"val.json:{number}", "file": file, "text": ARABIC})
        columns.append({"name": name, "values": {}, "samples": rows})
    write_wav(folder / "evaluation" / "reference" / "000.wav", 150)
    write_columns(folder, columns)
    return folder


def write_columns(folder: Path, columns: object) -> None:
    record = {"manifest": "val.json", "columns": columns}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(record))


def read_columns(folder: Path) -> list:
    return json.loads((folder / "evaluation" / "evaluation.json").read_text())["columns"]


def values_of(page: Path) -> dict:
    return json.loads(re.search(r'id="values">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_the_first_and_the_last_model_are_compared(evaluated: Path, tmp_path: Path, capsys):
    run(["report", str(evaluated), "--blind"])
    assert f"{NUM_PAIRS} pairs" in capsys.readouterr().out
    values = values_of(evaluated / "blind.html")
    assert values["models"] == ["base", "late"]
    assert [pair["number"] for pair in values["pairs"]] == list(range(NUM_PAIRS))
    assert values["pairs"][0]["text"] == ARABIC
    assert [pair["reference"] is not None for pair in values["pairs"]] == [True] + [False] * (NUM_PAIRS - 1)
    run(["report", str(evaluated), "--blind", "--columns", "early,base", "-o", str(tmp_path / "other.html")])
    assert values_of(tmp_path / "other.html")["models"] == ["early", "base"]


def test_the_text_is_the_samples_where_nobody_transcribed(evaluated: Path, tmp_path: Path):
    columns = read_columns(evaluated)
    for column in columns:
        for row in column["samples"]:
            del row["text"]
    write_columns(evaluated, columns)
    build_blind_test(evaluated, tmp_path / "page.html")
    texts = [pair["text"] for pair in values_of(tmp_path / "page.html")["pairs"]]
    assert all(texts[:8])  # the example's validation manifest has 8


def test_only_pairs_of_the_evaluations_own_files_are_played(evaluated: Path, tmp_path: Path):
    write_wav(tmp_path / "secret.wav", 100)
    columns = read_columns(evaluated)
    columns[0]["samples"][0]["file"] = "../../secret.wav"
    columns[0]["samples"][1]["file"] = str(tmp_path / "secret.wav")
    del columns[2]["samples"][2]
    (evaluated / "evaluation" / "base" / "003.wav").unlink()
    write_columns(evaluated, columns)
    assert build_blind_test(evaluated, tmp_path / "page.html") == NUM_PAIRS - 4
    assert values_of(tmp_path / "page.html")["pairs"][0]["number"] == 4


def test_a_full_page_leaves_the_last_prompts_out(evaluated: Path, tmp_path: Path, caplog):
    build_blind_test(evaluated, tmp_path / "all.html")
    pairs = values_of(tmp_path / "all.html")["pairs"]
    sizes = [sum(map(len, pair["said"])) + len(pair["reference"] or "") for pair in pairs]
    assert build_blind_test(evaluated, tmp_path / "some.html", audio_bytes=sum(sizes[:5]) + 10) == 5
    assert "from number 5 on" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "base,best"], "expected two of its models; found base, early, late"),
        (["--columns", "base"], "expected two different names"),
        (["--columns", "base,base"], "expected two different names"),
    ],
)
def test_models_that_are_not_there_are_refused(evaluated: Path, arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit) if "different" in message else pytest.raises(UserError, match=message):
        run(["report", str(evaluated), "--blind", *arguments])
    if "different" in message:
        assert message in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(evaluated: Path, tmp_path: Path, capsys):
    assert main(["report", str(evaluated), "--columns", "base,late"]) == 2
    assert main(["report", str(evaluated), str(evaluated), "--blind"]) == 2
    columns = read_columns(evaluated)
    for damaged in (columns[:1], [{"name": "base"}], 3):
        write_columns(evaluated, damaged)
        with pytest.raises(UserError, match=r"evaluation\.json: "):
            build_blind_test(evaluated, tmp_path / "page.html")
    (evaluated / "evaluation" / "evaluation.json").unlink()
    with pytest.raises(UserError, match="make one with: ds-higgs evaluate"):
        build_blind_test(evaluated, tmp_path / "page.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "dark"), [(390, True), pytest.param(1440, False, marks=pytest.mark.slow)])
def test_votes_by_keyboard_count_as_by_hand(evaluated: Path, tmp_path: Path, width: int, dark: bool):
    page = tmp_path / "blind.html"
    build_blind_test(evaluated, page)
    with Browser(tmp_path / "profile", width=width, dark=dark) as browser:
        browser.open(page)
        assert browser.ask("document.documentElement.scrollWidth") == width
        assert browser.ask("getComputedStyle(document.querySelector('.said-text')).direction") == "rtl"
        assert "base" not in browser.ask("document.getElementById('page').innerText")
        browser.press("ArrowLeft")
        assert browser.ask("document.getElementById('told').textContent") == "Listen to both first."

        # 7 of 10 decided pairs for the second model, whichever side it is on, and one for neither.
        wanted = [1] * 7 + [0] * 3 + [None]
        for place, model in enumerate(wanted):
            listen(browser)
            on_the_left = browser.ask(f"modelOn('left', {place_now(browser)})")
            keys = {on_the_left: "ArrowLeft", 1 - on_the_left: "ArrowRight", None: "ArrowDown"}
            browser.press(keys[model])
            if place == 4:
                browser.open(page)  # the votes are still there
                assert browser.ask("state.at") == 5
        assert browser.ask("count()") == {
            "wins": [3, 7],
            "neither": 1,
            "share": 0.7,
            "interval": pytest.approx([0.3968, 0.8922], abs=1e-4),  # Wilson's, from a table
        }
        assert "50 % is within it" in browser.ask("document.getElementById('verdict').textContent")
        cells = browser.ask("[...document.querySelectorAll('td')].map((cell) => cell.textContent)")
        assert cells == ["3", "7", "1"]
        saved = json.loads(browser.ask("resultText()"))
        preferred = [vote["preferred"] for vote in saved["votes"]]
        assert [preferred.count(name) for name in ("base", "late", "none")] == [3, 7, 1]

        browser.press("Backspace")
        listen(browser)
        browser.press("ArrowLeft")
        assert sum(browser.ask("count().wins")) == 11
        assert browser.ask("document.documentElement.scrollWidth") == width
        browser.click("#again")
        assert browser.ask("[state.at, count().neither, ...count().wins]") == [0, 0, 0, 0]
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith(("data:", page.as_uri()))] == []


def place_now(browser: Browser) -> int:
    return browser.ask("pairNow()")


def listen(browser: Browser) -> None:
    for key, side in (("1", "left"), ("2", "right")):
        browser.press(key)
        look = f"heard.has('{side}') ? done() : setTimeout(look, 10)"
        browser.ask(f"new Promise((done) => {{ const look = () => {{ {look}; }}; look(); }})")
