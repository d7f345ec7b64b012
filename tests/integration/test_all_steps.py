"""evaluate --all-steps, as typed: each adapter as it is evaluated alone, measured once, with one to take."""

import json
import logging
from pathlib import Path

import pytest
import torch

from ds_higgs.adapters.applying import wearing
from ds_higgs.adapters.opening import open_adapter
from ds_higgs.cli.main import run as run_command
from ds_higgs.commands import all_steps
from ds_higgs.commands.evaluate import compute_losses
from ds_higgs.commands.generate import VoiceOptions, load_voice
from ds_higgs.errors import UserError
from ds_higgs.training.per_sample import sums_by_sample
from ds_higgs.training.step_module import StepModule
from tests.support.runs import write_adapter, write_run, write_whole_weights

# By name, where each is below adapters/: of two steps, and of averaged weights. The final one is the second step.
ADAPTERS = {
    "step-00000005": "step-00000005",
    "step-00000005-ema": "step-00000005/ema",
    "step-00000010": "step-00000010",
}


@pytest.fixture(scope="module")
def run(tiny_base: Path, example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "voice"
    codes = tmp_path_factory.mktemp("codes")
    write_run(folder, tiny_base, val_manifest=example_dir / "val.json", cache_dir=str(codes))
    averaged = folder / "adapters" / ADAPTERS["step-00000005-ema"]
    write_adapter(tiny_base, averaged, seed=7)
    with open_adapter(averaged.parent) as of_step:
        of_step.record.write(averaged)
    return folder


def evaluate(*words: str | Path) -> None:
    run_command(["evaluate", *map(str, words), "--count", "2", "--max-seconds", "0.2"])


def columns_of(folder: Path) -> dict[str, dict]:
    return {column["name"]: column for column in json.loads((folder / "evaluation.json").read_text())["columns"]}


@pytest.fixture(scope="module")
def compared(run: Path) -> dict[str, dict]:
    evaluate(run, "--all-steps")
    return columns_of(run / "evaluation")


def test_each_adapter_is_as_it_is_alone(run: Path, compared: dict[str, dict], example_dir: Path, tmp_path: Path):
    """With whole modules in it, which are off again before the next; the base comes first, and last here."""
    assert list(compared) == ["base", *ADAPTERS]
    places = ["--manifest", example_dir / "val.json", "-o", tmp_path / "out"]
    evaluate(*(run / "adapters" / place for place in ADAPTERS.values()), *places)
    alone = columns_of(tmp_path / "out")
    assert list(alone) == ["base", "step-00000005", "ema", "step-00000010"]
    for name, other in zip(compared, alone, strict=True):
        assert compared[name]["values"] == alone[other]["values"]
        for row in alone[other]["samples"]:
            said = run / "evaluation" / name / Path(row["file"]).name
            assert (tmp_path / "out" / row["file"]).read_bytes() == said.read_bytes()
    assert len({column["values"]["audio_loss"] for column in compared.values()}) == len(compared)
    voice, _ = load_voice(VoiceOptions(read_as=run))
    before = {name: weight.clone() for name, weight in voice.model.named_parameters()}
    with open_adapter(run / "adapters" / "step-00000005") as adapter, wearing(voice.model, adapter) as model:
        assert len(dict(model.named_parameters())) > len(before)
    after = dict(voice.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_intervals_are_around_what_is_measured(run: Path, compared: dict[str, dict]):
    for column in compared.values():
        intervals = column["intervals"]
        assert {"loss", "text_loss", "audio_loss", "stop_rate", "mel_cepstral_distance"} <= set(intervals)
        for name, (low, high) in intervals.items():
            assert low <= column["values"][name] <= high, name
        assert intervals["audio_loss"][0] < intervals["audio_loss"][1]
    choice = json.loads((run / "evaluation" / "evaluation.json").read_text())["choice"]
    losses = {name: column["values"]["audio_loss"] for name, column in compared.items()}
    assert (choice["by"], choice["name"]) == ("audio_loss", min(losses, key=lambda name: losses[name]))
    for one in choice["against"]:
        assert one["difference"] == pytest.approx(losses[one["name"]] - choice["value"])
        assert one["low"] <= one["difference"] <= one["high"]


def test_losses_are_of_their_samples(run: Path):
    """However they are batched, and whatever is beside them."""
    voice, loss = load_voice(VoiceOptions(read_as=run))
    dataset = voice.read_manifest(Path(voice_manifest(run)))
    ids = StepModule(voice.model).placeholder_ids
    found: dict[int, dict[str, torch.Tensor]] = {}
    for batch_size in (1, 3):
        table = found.setdefault(batch_size, {})

        def add(batch, targets, scores, table=table) -> None:
            table |= zip(batch.sample_ids, sums_by_sample(batch, targets, scores, placeholder_ids=ids), strict=True)

        compute_losses(voice, dataset, loss, batch_size=batch_size, each=add)
    assert len(found[1]) == len(dataset) == 8
    for name, alone in found[1].items():
        assert torch.allclose(found[3][name], alone, rtol=1e-4), name
        assert alone[1].min() > 0


def voice_manifest(run: Path) -> str:
    return json.loads((run / "evaluation" / "evaluation.json").read_text())["manifest"]


def test_what_is_measured_is_not_measured_again(run: Path, compared, caplog, monkeypatch, capsys):
    caplog.set_level(logging.INFO)
    changed, unheard = "step-00000005", "step-00000010"
    (run / "adapters" / changed / "README.md").write_text("another one")
    (run / "evaluation" / unheard / "000.wav").unlink()
    measured = []
    usual = all_steps._Bench._measure_now

    def measure(self, candidate):
        measured.append(candidate.name)
        return usual(self, candidate)

    monkeypatch.setattr(all_steps._Bench, "_measure_now", measure)
    evaluate(run, "--all-steps")
    assert measured == [changed, unheard]
    assert columns_of(run / "evaluation") == compared
    monkeypatch.setattr(all_steps, "load_voice", None)
    capsys.readouterr()
    evaluate(run, "--all-steps", "--by", "mel_cepstral_distance", "--no-base")
    assert [line.split()[0] for line in caplog.messages[-3:]] == list(ADAPTERS)
    said = capsys.readouterr().out
    assert "by mel-cepstral distance, dB on 2 samples: step-" in said
    assert "base" not in said


def test_whole_weights_follow_each_other(tiny_base: Path, run: Path, example_dir: Path, tmp_path: Path):
    for step, seed in ((1, 1), (2, 2)):
        write_whole_weights(tiny_base, tmp_path / str(step), seed=seed)
    voice, loss = load_voice(VoiceOptions(read_as=run))
    dataset = voice.read_manifest(example_dir / "val.json")
    losses = []
    for step in ("1", "2"):
        with open_adapter(tmp_path / step) as adapter, wearing(voice.model, adapter):
            losses.append(compute_losses(voice, dataset, loss, batch_size=4)["loss"])
    alone, _ = load_voice(VoiceOptions(read_as=run))
    with open_adapter(tmp_path / "2") as adapter, wearing(alone.model, adapter):
        assert compute_losses(alone, dataset, loss, batch_size=4)["loss"] == losses[1] != losses[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--all-steps", "--step", "5"], "as it was trained; expected it without --step"),
        (["--all-steps", "--lora-scale", "0.5"], "without --lora-scale"),
        (["--all-steps", "--by", "beauty"], "--by: found 'beauty', expected one of loss"),
        (["--by", "loss"], "--by goes with --all-steps"),
        (["OTHER", "--all-steps"], "expected one run, found 2"),
        (["--all-steps", "--asr", "nowhere/at/all"], "nowhere/at/all: cannot be loaded as a speech recogniser"),
        (["--asr", "nowhere/at/all"], "nowhere/at/all: cannot be loaded as a speech recogniser"),
    ],
)
def test_mistakes_are_told(run: Path, words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        evaluate(run, *words)
