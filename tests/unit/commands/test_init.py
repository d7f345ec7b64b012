"""`init`: what it finds in data and machine, what it writes, and that it never overwrites."""

import shutil

import pytest
import soundfile
import yaml

from ds_higgs.cli.main import run
from ds_higgs.commands.init import InitOptions, make_config
from ds_higgs.commands.init_facts import look_at
from ds_higgs.commands.recipes.goals import CARDS, GOALS, find_card
from ds_higgs.config import Config, OptimConfig
from ds_higgs.config.file import load_config
from ds_higgs.errors import UserError
from ds_higgs.training.set_up import warn_of_hasty_start, warn_of_high_rate


@pytest.fixture
def recordings(example_dir, tmp_path):
    """A folder of wav + txt, by speaker."""
    folder = tmp_path / "recordings"
    for path in sorted((example_dir / "audio").glob("speaker_00[12]_0*.flac")):
        place = folder / path.stem[:11]
        place.mkdir(parents=True, exist_ok=True)
        samples, rate = soundfile.read(path)
        soundfile.write(place / f"{path.stem}.wav", samples, rate)
        (place / f"{path.stem}.txt").write_text("صباح الخير" if "001" in path.stem else "Good morning")
    return folder


def test_recordings_become_manifests_and_a_configuration(recordings, tiny_base, tmp_path, capsys):
    out = tmp_path / "job" / "config.yaml"
    run(["init", str(recordings), "-o", str(out), "--base", str(tiny_base), "--split", "0.2", "--card", "24gb"])
    told = capsys.readouterr().out
    assert "2 speakers" in told
    assert "Arabic" in told
    assert "Latin" in told
    config = load_config(out, {})
    assert config.data.train_manifest == tmp_path / "job" / "train.json"
    assert config.data.val_manifest.is_file()
    assert config.optim.learning_rate == GOALS["voice"].learning_rate
    assert (config.optim.warmup_steps, config.optim.global_batch_size) == (1, 8)
    text = out.read_text()
    assert text.startswith("# yaml-language-server: $schema=/")
    assert "2 speakers: the goal `voice` is meant for 10 to 60 minutes of one person" in text
    with pytest.raises(UserError, match="exists already, and is left as it is"):
        run(["init", str(recordings), "-o", str(out)])
    assert out.read_text() == text


def test_how_speakers_were_counted_is_told_where_no_folder_names_them(recordings, tmp_path):
    """Of a flat folder, and of recordings that lie beside folders; where each has a folder there is nothing to tell."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in recordings.rglob("*.*"):
        shutil.copy(path, flat)
    beside = tmp_path / "beside"
    shutil.copytree(flat, beside)
    shutil.copytree(recordings / "speaker_001", beside / "speaker_001")
    options = InitOptions("voice", "BASE", "24gb", share=0.2)
    for source, told in ((flat, True), (beside, True), (recordings, False)):
        lines = "\n".join(make_config(source, tmp_path / source.name / "job" / "config.yaml", options))
        assert (f"what lies in {source} itself is one, {source.name}; where it is several people" in lines) == told


def test_a_manifest_is_taken_as_it_is(example_dir, tmp_path):
    options = InitOptions("language", "BASE", "8xh200", example_dir / "val.json")
    lines = list(make_config(example_dir / "train.json", tmp_path / "config.yaml", options))
    assert "deepspeed --num_gpus 8" in lines[-1]
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert values["data"]["train_manifest"] == str(example_dir / "train.json")
    assert values["lora"]["rank"] == 64
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_facts_are_those_of_the_targets(example_dir, tmp_path):
    facts = look_at(example_dir / "train.json")
    assert (facts.num_samples, facts.speakers) == (24, 4)
    assert set(facts.scripts) == {"Arabic", "Latin"}
    assert sum(facts.scripts.values()) == pytest.approx(1)
    assert len(facts.seconds) == 24
    lengths = [soundfile.info(path).duration for path in (example_dir / "audio").glob("*.flac")]
    assert min(lengths) <= facts.mean_seconds <= max(facts.seconds) <= max(lengths)
    shutil.copy(example_dir / "train.json", tmp_path)
    with pytest.raises(UserError, match="file not found"):
        look_at(tmp_path / "train.json")


@pytest.mark.parametrize(
    ("gib", "num_gpus", "like"), [(15.8, 1, "16gb"), (23.6, 1, "24gb"), (79.2, 2, "80gb"), (139.8, 8, "8xh200")]
)
def test_the_card_is_that_of_the_machine(gib, num_gpus, like):
    card = find_card(gib, num_gpus)
    assert card.quantization == CARDS[like].quantization
    assert card.num_gpus == num_gpus


def test_without_a_gpu_it_is_for_trying_things_out():
    assert (find_card(0, 0).gib, find_card(0, 0).quantization) == (0, None)


@pytest.mark.parametrize(
    ("rate", "steps", "warned"), [(2e-4, 0, True), (2e-4, 10, False), (2e-4, "auto", False), (1e-4, 0, False)]
)
def test_a_hasty_start_is_warned_of(rate, steps, warned, caplog):
    warn_of_hasty_start(OptimConfig(learning_rate=rate, warmup_steps=steps))
    assert ("there is no warm-up" in caplog.text) == warned


@pytest.mark.parametrize(
    ("mode", "optim", "warned"),
    [
        ("lora", {"whole_learning_rate": 1e-4}, True),
        ("lora", {"whole_learning_rate": 2e-5, "learning_rate": 2e-4}, False),
        ("lora", {"learning_rate": 1e-4}, False),
        ("full", {"learning_rate": 1e-4}, True),
        ("full", {"learning_rate": 2e-5}, False),
        ("full", {"learning_rate": 5e-3, "type": "muon", "max_grad_norm": 0}, False),
    ],
)
def test_a_rate_for_lora_is_warned_of_in_other_modes(mode, optim, warned, caplog):
    values = {"run": {"output_dir": "run"}, "model": {"base": "base"}, "data": {"train_manifest": "train.json"}}
    whole = {"targets": ["attention"], "modules_to_save": ["audio_ffn"]} if "whole_learning_rate" in optim else {}
    warn_of_high_rate(Config.model_validate(values | {"train": {"mode": mode}, "optim": optim, "lora": whole}))
    assert ("a rate for LoRA" in caplog.text) == warned
