"""`ds-higgs inspect`: its page names every planted fault, and a real browser shows, plays, filters and copies."""

import json
import re
from pathlib import Path

import pytest

from ds_higgs.cli.main import run
from ds_higgs.commands.inspect import inspect
from ds_higgs.config import Config
from ds_higgs.errors import UserError
from ds_higgs.report import inspection as page_module
from ds_higgs.report.inspection import build_inspection
from tests.support.browser import CHROMIUM, LOOKS, Browser
from tests.support.planted_faults import EXPECTED, write_planted

EVIL = "</script><img src=x onerror=alert(document.title)>"


def config_for(train: Path, val: Path, tiny_base: Path, folder: Path, **data) -> Config:
    manifests = {"train_manifest": train, "val_manifest": val, "cache_dir": folder / "codes"}
    return Config(run={"output_dir": folder / "run"}, model={"base": str(tiny_base)}, data={**manifests, **data})


@pytest.fixture(scope="module")
def planted(example_dir, tmp_path_factory) -> tuple[Path, Path]:
    train, val = write_planted(tmp_path_factory.mktemp("planted") / "data", example_dir)
    samples = json.loads(train.read_text())
    samples[4]["messages"][2]["content"][0]["text"] += EVIL
    train.write_text(json.dumps(samples))
    return train, val


@pytest.fixture(scope="module")
def inspection(planted, tiny_base, tmp_path_factory):
    return inspect(config_for(*planted, tiny_base, tmp_path_factory.mktemp("work")))


@pytest.fixture(scope="module")
def page(inspection, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "inspect.html"
    build_inspection(inspection, out, audio_bytes=20_000_000)
    return out


def values_of(page: Path) -> dict:
    return json.loads(re.search(r'id="values">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_the_page_names_every_planted_fault(page):
    values = values_of(page)
    found = {(sample["name"], warning["kind"]) for sample in values["samples"] for warning in sample["warnings"]}
    assert set(EXPECTED.items()) <= found
    assert {name for name, _ in found} == set(EXPECTED)
    assert {kind["name"] for kind in values["kinds"]} == {kind for _, kind in found}
    scores = [sample["score"] for sample in values["samples"]]
    assert scores == sorted(scores, reverse=True)
    assert values["num_samples"] == 32
    assert EVIL not in page.read_text(encoding="utf-8")
    assert len(values["audio"]) == len(set(values["audio"])) > 32


def test_players_and_samples_fit_their_room(inspection, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MAX_SAMPLES", 5)
    build_inspection(inspection, tmp_path / "small.html", audio_bytes=100_000)
    values = values_of(tmp_path / "small.html")
    assert (len(values["samples"]), values["num_samples"]) == (5, 32)
    assert 0 < sum(map(len, values["audio"])) <= 100_000
    assert values["samples"][0]["clips"][0]["audio"] == 0
    assert values["samples"][-1]["clips"][-1]["audio"] is None


def test_the_names_of_the_page_can_be_left_out(page, planted, tiny_base, tmp_path, capsys):
    worst = [sample["name"] for sample in values_of(page)["samples"] if sample["score"]]
    (tmp_path / "exclude.txt").write_text("\n".join(worst))
    config = config_for(*planted, tiny_base, tmp_path, exclude=tmp_path / "exclude.txt")
    left = inspect(config)
    assert (len(left.samples), left.num_excluded) == (32 - len(worst), len(worst))
    assert {one.sample.name for one in left.samples}.isdisjoint(worst)
    assert [one for one in left.samples if one.warnings] == []
    flags = [f"--train_manifest={planted[0]}", f"--val_manifest={planted[1]}", f"--base_ckpt={tiny_base}"]
    out = tmp_path / "new" / "page.html"
    run(["inspect", *flags, f"--output_dir={tmp_path}", f"--data.cache_dir={tmp_path / 'codes'}", "-o", str(out)])
    assert f"{out}: 32 samples, {len(worst)} with warnings; " in capsys.readouterr().out


def test_samples_with_problems_are_told_not_shown(example_dir, tiny_base, tmp_path):
    samples = json.loads((example_dir / "train.json").read_text())
    samples[3]["messages"][0]["role"] = "narrator"
    train = tmp_path / "train.json"
    train.write_text(json.dumps(samples))
    config = config_for(train, example_dir / "val.json", tiny_base, tmp_path, audio_root=example_dir)
    found = inspect(config)
    assert len(found.samples) == 31
    build_inspection(found, tmp_path / "page.html", audio_bytes=1)
    assert "narrator" in values_of(tmp_path / "page.html")["problems"][0]
    train.write_text(json.dumps(samples[3:4]))
    with pytest.raises(UserError, match="no sample can be used"):
        inspect(config_for(train, train, tiny_base, tmp_path, audio_root=example_dir))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_real_browser_shows_plays_filters_and_copies(page: Path, tmp_path: Path, width: int, dark: bool):
    with Browser(tmp_path / "profile", width=width, dark=dark) as browser:
        browser.open(page)
        assert browser.ask("document.documentElement.dataset.theme") == ("dark" if dark else "light")
        assert browser.ask("document.documentElement.scrollWidth") == width
        sections = browser.ask("[...document.querySelectorAll('section')].map((section) => section.id)")
        assert sections == ["warnings", "speakers", "samples"]
        names = "[...document.querySelectorAll('.name')].map((one) => one.textContent)"
        assert len(browser.ask(names)) == 30
        play = "Promise.all([...document.querySelectorAll('audio')].map(async (a) => (await a.play(), a.duration)))"
        seconds = browser.ask(play)
        assert len(seconds) > 50
        assert min(seconds) > 0.5
        assert browser.ask("document.querySelectorAll('svg.outline path').length") == len(seconds)
        browser.ask("document.querySelector('.more').click()")
        assert len(browser.ask(names)) == 32

        browser.ask("(choose('kind', 'digits'), 0)")
        assert browser.ask(names) == ["train.json:0"]
        browser.ask("(choose('kind', ''), choose('text', 'الشمس speaker_004'), 0)")
        found = browser.ask(names)
        assert 1 <= len(found) < 6
        browser.ask("(choose('text', ''), choose('speaker', 'speaker_002'), 0)")
        assert len(browser.ask(names)) == 8
        assert browser.ask("document.querySelector('.said-text').textContent") != ""

        browser.ask("(choose('speaker', ''), 0)")
        first = browser.ask("document.querySelector('.name').textContent")
        browser.click(".name")
        browser.ask("new Promise((done) => setTimeout(done, 300))")
        assert browser.ask("document.getElementById('copied').textContent") == f"copied {first}"
        browser.click("article:nth-of-type(2) .name")
        assert browser.ask("document.getElementById('exclude').value").splitlines()[0] == first
        assert browser.ask("document.querySelector('.name').getAttribute('aria-pressed')") == "true"
        assert browser.ask("document.documentElement.scrollWidth") == width
        browser.click(".name")
        assert first not in browser.ask("document.getElementById('exclude').value").splitlines()
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith(("data:", page.as_uri()))] == []
