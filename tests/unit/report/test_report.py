"""The page of a run: what it tells, that it stays small and closed, and that a real browser shows it."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from ds_higgs.commands.evaluate import MEASURES
from ds_higgs.errors import UserError
from ds_higgs.report import build_report
from ds_higgs.report.collect import collect_run, histogram
from ds_higgs.report.players import _most_telling_first, collect_players
from ds_higgs.report.series import read_curve, thin
from ds_higgs.run_folder import RunFolder
from tests.support.browser import CHROMIUM, LOOKS, Browser

RATE = 24_000
STEPS = 40
EVIL = "</script><img src=x onerror=alert(1)>"


def step_line(step: int) -> dict:
    loss = 7.0 * math.exp(-step / 40)
    return {
        **{"event": "step", "step": step, "epoch": 1 + step // 10, "loss": loss + 1, "text_loss": 1.0},
        **{"audio_loss": loss, "audio_loss_per_codebook": [loss + 0.1 * c for c in range(8)]},
        **{"learning_rate": 1e-4, "grad_norm": "nan" if step == 7 else 1.0 / step, "num_samples": 8},
        **{"num_tokens": 1000, "num_text_targets": 90, "num_audio_targets": 3600, "step_time_s": 0.5},
        **{"samples_per_second": 16.0, "tokens_per_second": 2000.0, "peak_memory_gib": 1.5, "applied": step != 7},
    }


def ends_after(step: int) -> dict:
    """What validation tells of ends and onsets; here no words are learned, as in the form that servers send."""
    return {
        **{"eos_probability": step / STEPS, "false_eos_rate": 0.01, "num_ends": 8, "words_loss": None},
        **{"onset_audio_loss": 5.0, "later_audio_loss": 4.0, "audio_start_loss": 0.5, "end_tokens_loss": 0.1},
    }


def write_run(folder: Path, example: Path, *, troubled: bool) -> Path:
    shutil.copytree(example, folder / "data", ignore=shutil.ignore_patterns("*.py"))
    samples = json.loads((folder / "data" / "val.json").read_text())
    samples[0]["messages"][2]["content"][0]["text"] = f"صباح الخير {EVIL}"
    (folder / "data" / "val.json").write_text(json.dumps(samples))
    manifests = {f"{key}_manifest": str(folder / "data" / f"{key}.json") for key in ("train", "val")}
    config = {"run": {"output_dir": str(folder)}, "data": manifests, "optim": {"learning_rate": 1e-4 + troubled}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [step_line(step) for step in range(1, STEPS + 1)]
    for step in (0, 20, STEPS):
        losses = {key: value for key, value in step_line(max(step, 1)).items() if "loss" in key}
        lines.append({"event": "eval", "step": step, **losses, **ends_after(step)})
        lines += [write_sample(folder, step, number) for number in (0, 1)]
    if troubled:
        lines.append({"event": "resume", "step": 12, "checkpoint": "x"})
        lines.append({"event": "save_error", "step": 9, "message": "no space left"})
        reject = {"file": "train.json", "number": 3, "sample": "train.json:3", "reasons": ["the audio is silent"]}
        (folder / "rejected.jsonl").write_text(json.dumps(reject) + "\n")
        record = {"step": 7, "rank": 0, "samples": [["train.json:9"]], "loss": "nan", "grad_norm": "inf"}
        (folder / "nonfinite-step-00000007-rank-00000.json").write_text(json.dumps(record))
        (folder / "failure.txt").write_text("rank 1: out of memory\n")
    else:
        lines.append({"event": "end", "step": STEPS, "reason": "done"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_sample(folder: Path, step: int, number: int) -> dict:
    file = f"samples/step-{step:08d}/{number:03d}.wav"
    for name in (file, f"samples/target/{number:03d}.wav", f"samples/reference/{number:03d}.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tone = 0.3 * np.sin(2 * np.pi * (200 + step) * np.arange(RATE) / RATE)
        soundfile.write(folder / name, tone, RATE)
    return {
        **{"event": "sample", "step": step, "number": number, "sample_id": f"val.json:{number}", "file": file},
        **{"stopped_by": "eos" if step else "length", "seconds": 1.0, "duration_ratio": 0.9, "silence_share": 0.1},
        **{"mel_cepstral_distance": 6.5, "code_accuracy": 0.5, "code_accuracy_per_codebook": [0.5] * 8},
        **judged(step, number),
    }


def judged(step: int, number: int) -> dict:
    """What judges say of a prompt of 4 words, or of 12: fewer errors with every step."""
    words = {"edits": 4 - step // 10, "length": 12 if number else 4}
    return {
        **{"text": "صباح الخير", "heard": "صباح", "word_errors": words, "character_errors": {"edits": 1, "length": 9}},
        "speaker_similarity": 0.5 + step / 100,
    }


@pytest.fixture(scope="module")
def runs(example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    good = write_run(folder / "good", example_dir, troubled=False)
    values = {"audio_loss": 5.0, "stop_rate": 1.0}
    values |= {key: 0.125 for key, _, better in MEASURES if better is not None and key not in values}
    intervals = {key: [0.1, 0.15] for key in values} | {"audio_loss": [4.5, 5.5]}
    columns = [{"name": name, "values": values, "samples": [], "intervals": intervals} for name in ("base", "خطوة")]
    against = [{"name": "base", "difference": -0.25, "low": -0.5, "high": 0.125, "decided": False}]
    choice = {"by": "audio_loss", "name": "خطوة", "value": 5.0, "num_samples": 8, "against": against}
    (good / "evaluation").mkdir()
    record = {"manifest": "val.json", "columns": columns, "choice": choice}
    (good / "evaluation" / "evaluation.json").write_text(json.dumps(record))
    return good, write_run(folder / "troubled", example_dir, troubled=True)


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    build_report(runs[:1], out)
    return out


def test_the_summary_adds_up(runs: tuple[Path, Path]):
    summary = collect_run(RunFolder.open(runs[0]))["summary"]
    assert summary["status"] == "done"
    assert (summary["steps"], summary["samples"], summary["seconds"]) == (STEPS, 8 * STEPS, 0.5 * STEPS)
    assert summary["best_audio_loss"] == summary["last_audio_loss"] < summary["first_audio_loss"]
    assert collect_run(RunFolder.open(runs[1]))["summary"]["status"] == "not ended"


def test_curves_have_every_codebook_and_gaps_for_what_is_not_finite(runs: tuple[Path, Path]):
    curves = collect_run(RunFolder.open(runs[0]))["curves"]
    assert {f"{source}/codebook_{c}" for source in ("train", "val") for c in range(8)} <= set(curves)
    assert curves["train/grad_norm"][6] == (7.0, None)
    assert curves["train/grad_norm"][9] == (10.0, 0.1)
    assert curves["samples/stop_rate"] == [(0.0, 0.0), (20.0, 1.0), (40.0, 1.0)]


def test_curves_tell_of_ends_and_onsets(runs: tuple[Path, Path]):
    curves = collect_run(RunFolder.open(runs[0]))["curves"]
    assert curves["val/eos_probability"] == [(0.0, 0.0), (20.0, 0.5), (40.0, 1.0)]
    kinds = ("false_eos_rate", "onset_audio_loss", "later_audio_loss", "audio_start_loss", "end_tokens_loss")
    assert {f"val/{kind}" for kind in kinds} <= set(curves)
    assert "val/words_loss" not in curves


def test_curves_and_players_tell_what_judges_heard(runs: tuple[Path, Path], tmp_path: Path):
    collected = collect_run(RunFolder.open(runs[0]))
    assert collected["curves"]["samples/word_error_rate"] == [(0.0, 0.5), (20.0, 0.25), (40.0, 0.0)]  # 8 of 16 words
    assert collected["curves"]["samples/speaker_similarity"] == [(0.0, 0.5), (20.0, 0.7), (40.0, 0.9)]
    said = collect_players(RunFolder.open(runs[0]), budget_bytes=10**9)["prompts"][1]["said"][1]
    assert (said["heard"], said["word_error_rate"], said["speaker_similarity"]) == ("صباح", 2 / 12, 0.7)

    folder = shutil.copytree(runs[0], tmp_path / "damaged")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    damages: list = [{"edits": "3", "length": 4}, None, {"edits": 1}, 7, {"edits": 1.5, "length": 2}, [1, 2]]
    for line, damage in zip((line for line in lines if line["event"] == "sample"), damages, strict=True):
        line |= {"word_errors": damage, "heard": damage}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = collect_run(RunFolder.open(folder))["curves"]
    assert "samples/word_error_rate" not in curves
    assert "samples/character_error_rate" in curves
    assert collect_players(RunFolder.open(folder), budget_bytes=10**9)["prompts"][0]["said"][0]["heard"] is None


def test_a_long_curve_is_thinned_by_means():
    points = [(float(step), float(step)) for step in range(100_000)]
    thinned = thin(points, most=1000)
    assert len(thinned) == 1000
    assert thinned[0] == (49.5, 49.5)
    assert thin([(1.0, None), (2.0, 3.0), (3.0, None), (4.0, None)], most=2) == [(1.5, 3.0), (3.5, None)]
    assert read_curve([{"step": 1, "x": "nan"}], "x") == []


def test_data_statistics(runs: tuple[Path, Path]):
    data = collect_run(RunFolder.open(runs[0]))["data"]
    assert (data["train"]["samples"], data["train"]["num_speakers"]) == (24, 4)
    assert sum(count for _, _, count in data["train"]["text_histogram"]) == 24
    assert histogram([5, 5, 6, 30]) == [
        (5, 7, 3),
        (8, 10, 0),
        *[(low, low + 2, 0) for low in range(11, 29, 3)],
        (29, 31, 1),
    ]


def test_what_went_wrong_is_told(runs: tuple[Path, Path]):
    trouble = collect_run(RunFolder.open(runs[1]))["trouble"]
    assert trouble["num_rejected"] == 1
    assert trouble["rejected"][0]["reasons"] == ["the audio is silent"]
    assert (trouble["resumes"], trouble["skipped_steps"]) == ([12], [7])
    assert trouble["non_finite"] == ["Step 7, rank 0: loss nan, gradient norm inf; samples train.json:9"]
    assert "out of memory" in trouble["failure"]
    assert trouble["save_errors"] == [{"step": 9, "message": "no space left"}]


@pytest.fixture
def hostile(example_dir: Path, tmp_path: Path) -> Path:
    """A run whose small files were damaged, and whose metrics name WAVs that are not its own."""
    run = write_run(tmp_path / "hostile", example_dir, troubled=True)
    rate, waveform = RATE, np.zeros(RATE)
    for place in (tmp_path / "secret.wav", run / "data" / "secret.wav"):
        soundfile.write(place, waveform, rate)
    (run / "samples" / "link.wav").symlink_to(tmp_path / "secret.wav")
    (run / "samples" / "target" / "000.wav").unlink()
    (run / "samples" / "target" / "000.wav").symlink_to(tmp_path / "secret.wav")
    (run / "samples" / "noise.wav").write_bytes(b"RIFF no wave")
    row = write_sample(run, 60, 0)
    files = [str(tmp_path / "secret.wav"), "../secret.wav", "data/secret.wav", "samples/../data/secret.wav"]
    files += ["samples/link.wav", "samples/noise.wav", "\x00", "config.yaml", "nowhere.wav"]
    rows = [{**row, "step": 100 + step, "file": file} for step, file in enumerate(files)]
    rows += [{**row, "number": "0"}, {**row, "file": 3}, {"event": "sample", "step": 2}]
    rows.append({**row, "step": 200, "seconds": "long", "code_accuracy": None, "stopped_by": [1]})
    rows += [{"event": "eval", "step": 50, "loss": "nan", "audio_loss_per_codebook": 3}, {"event": "end", "step": 9}]
    rows += [{"event": "save_error", "step": 9}, {"event": "step", "step": 70, "num_samples": "x", "loss": None}]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "st\n[]\n\x00\n')
    with (run / "rejected.jsonl").open("a") as file:
        file.write('{"sample": "a\u2028b.json:1", "reasons": ["x"]}\n{"sample": 1}\n{\n')
    (run / "nonfinite-step-00000008-rank-00000.json").write_text("{")
    (run / "nonfinite-step-00000009-rank-00000.json").write_text('{"samples": 3}')
    (run / "failure.txt").write_bytes(b"\xff out of memory")
    (run / "evaluation").mkdir()
    return run


@pytest.mark.parametrize(
    "evaluation",
    [
        *["{", "[]", "{}", '{"manifest": 3, "columns": []}', '{"manifest": "m", "columns": [{"name": 1}]}'],
        '{"manifest": "m", "columns": [{"name": "a", "values": {}, "intervals": {"loss": [1]}}]}',
        '{"manifest": "m", "columns": [], "choice": {"by": "loss"}}',
    ],
)
def test_damaged_files_are_skipped_and_told(hostile: Path, evaluation: str, tmp_path: Path, caplog):
    (hostile / "evaluation" / "evaluation.json").write_text(evaluation)
    build_report([hostile], tmp_path / "report.html")
    for name in ("evaluation.json", "metrics.jsonl", "rejected.jsonl", "nonfinite-step-00000008", "noise.wav"):
        assert name in caplog.text
    values = collect_run(RunFolder.open(hostile))
    assert values["comparison"] is None
    assert [row["sample"] for row in values["trouble"]["rejected"]] == ["train.json:3", "a\u2028b.json:1"]
    assert values["trouble"]["non_finite"][1].startswith("Step None, rank None: loss None")
    assert values["evaluations"][-1] == {
        **{"step": 50, "loss": None, "text_loss": None, "audio_loss": None},
        "audio_loss_per_codebook": [],
    }


def test_only_wavs_of_the_run_are_embedded(hostile: Path):
    first = collect_players(RunFolder.open(hostile), budget_bytes=10_000_000)["prompts"][0]
    assert first["target"] is None
    assert first["reference"] is not None
    assert {row["step"] for row in first["said"] if row["audio"]} == {0, 20, STEPS, 200}
    assert len(first["said"]) == 13


def test_a_failure_that_was_mended_is_not_told_as_one(example_dir: Path, tmp_path: Path):
    run = write_run(tmp_path / "run", example_dir, troubled=True)
    (run / "failure.txt").rename(run / "failure-mended.txt")
    trouble = collect_run(RunFolder.open(run))["trouble"]
    assert trouble["failure"] is None
    assert "out of memory" in trouble["mended_failure"]


def test_players_fit_their_budget_and_keep_the_first_and_the_last_step(runs: tuple[Path, Path]):
    run = RunFolder.open(runs[0])
    everything = collect_players(run, budget_bytes=10_000_000)
    prompts = everything["prompts"]
    assert everything["left_out"] == 0
    needed = [
        sum(map(len, [p["reference"], p["target"], p["said"][0]["audio"], p["said"][2]["audio"]])) for p in prompts
    ]
    little = collect_players(run, budget_bytes=2 * max(needed) + 100)
    assert little["left_out"] == 2
    assert [player["audio"] is None for player in little["prompts"][0]["said"]] == [False, True, False]
    assert _most_telling_first([0, 1, 2, 3, 4]) == [4, 0, 2, 1, 3]


def test_a_run_that_is_named_from_where_one_stands_has_all_its_players(runs: tuple[Path, Path], monkeypatch):
    everything = collect_players(RunFolder.open(runs[0]), budget_bytes=10_000_000)
    monkeypatch.chdir(runs[0].parent)
    assert collect_players(RunFolder.open(Path(runs[0].name)), budget_bytes=10_000_000) == everything


def test_the_page_is_closed_and_small(page: Path):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 5_000_000
    assert "default-src 'none'" in text.split("</head>")[0].replace("&#x27;", "'")
    assert EVIL not in text
    assert not re.search(r'(src|href)="(?!#)', text.split('<script type="application/json"')[0])
    values = json.loads(re.search(r'id="values">(.*?)</script>', text, re.DOTALL)[1])
    assert EVIL in values["runs"][0]["players"]["prompts"][0]["text"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not the folder of a run"):
        build_report([tmp_path], tmp_path / "report.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "dark"), LOOKS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_real_browser_shows_it(runs: tuple[Path, Path], tmp_path: Path, width: int, dark: bool, count: int):
    page = tmp_path / "report.html"
    build_report(runs[:count], page)
    with Browser(tmp_path / "profile", width=width, dark=dark) as browser:
        browser.open(page)
        assert browser.ask("document.documentElement.dataset.theme") == ("dark" if dark else "light")
        assert browser.ask("document.documentElement.scrollWidth") == width
        sections = browser.ask("[...document.querySelectorAll('section')].map((section) => section.id)")
        assert sections == ["curves", "evaluation", "samples", "data", "trouble", "config"]
        assert browser.ask("[...document.querySelectorAll('figure')].every((one) => one.querySelector('path'))")
        titles = browser.ask("[...document.querySelectorAll('#curves figure h3')].map((one) => one.textContent)")
        for title in ("Ends of speech", "Audio loss, onset and rest", "Text loss by kind"):
            assert sum(one.startswith(title) for one in titles) == count
        assert browser.ask("document.querySelectorAll('figure').length") >= 17
        play = "Promise.all([...document.querySelectorAll('audio')].map(async (a) => (await a.play(), a.duration)))"
        seconds = browser.ask(play)
        assert len(seconds) == 2 * (2 + 3 * count)
        assert all(abs(length - 1) < 0.1 for length in seconds)
        text = browser.ask("document.getElementById('page').innerText")
        assert EVIL in text
        assert "خطوة, 5" in text
        assert "Not decided against base (−0.25, −0.5 to +0.125)" in text
        assert "4.5 to 5.5" in text
        assert ("out of memory" in text) == (count == 2)
        browser.ask("document.querySelector('header button').click()")
        assert browser.ask("document.documentElement.dataset.theme") == ("light" if dark else "dark")
        toggle_legend = (
            "const key = document.querySelector('.legend button'); key.click(); key.getAttribute('aria-pressed')"
        )
        assert browser.ask(toggle_legend) == "false"
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith(("data:", page.as_uri()))] == []
