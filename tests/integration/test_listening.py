"""A run that speaks while it trains: what it writes, and that training does not notice. And a native base."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_higgs.adapters.native import save_native_model
from ds_higgs.commands.export import export
from ds_higgs.model.loading import load_model
from tests.support import launching

RANKS, STEPS, PROMPTS = 2, 2, 3
SECRETS = dict.fromkeys(("WANDB_API_KEY", "COMET_API_KEY", "HF_TOKEN"), "s3cr3t-0f-a-tracker")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


def train(run_dir: Path, base: Path, codes: Path, example_dir: Path, *options: str) -> str:
    config = str(example_dir / "config.yaml")
    paths = ["--run.output_dir", str(run_dir), "--model.base", str(base), "--data.cache_dir", str(codes)]
    command = ["train", "-c", config, *paths, "--run.max_steps", str(STEPS), *options]
    done = launching.run_ranks(RANKS, "-m", "ds_higgs", *command, env=SECRETS)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "s3cr3t-0f-a-tracker" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def heard(tiny_base: Path, codes: Path, example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that speaks three prompts before the first step and after each."""
    run_dir = tmp_path_factory.mktemp("runs") / "heard"
    speak = ["--eval.num_audio_samples", str(PROMPTS), "--eval.audio_every", "1", "--eval.max_audio_s", "1"]
    train(run_dir, tiny_base, codes, example_dir, *speak)
    return run_dir


def events(run_dir: Path, event: str) -> list[dict]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def test_every_prompt_is_spoken_saved_and_measured(heard: Path):
    rows = events(heard, "sample")
    assert [(row["step"], row["number"]) for row in rows] == [(s, n) for s in range(STEPS + 1) for n in range(PROMPTS)]
    assert [row["sample_id"] for row in rows[:PROMPTS]] == ["val.json:0", "val.json:4", "val.json:7"]
    for row in rows:
        assert row["file"] == f"samples/step-{row['step']:08d}/{row['number']:03d}.wav"
        info = soundfile.info(heard / row["file"])
        assert info.samplerate == 24_000
        assert info.duration == pytest.approx(row["seconds"], abs=1e-3)
        assert len(row["code_accuracy_per_codebook"]) == 8
    for name in ("target", "reference"):
        assert len(list((heard / "samples" / name).glob("*.wav"))) == PROMPTS


def test_split_weights_are_gathered_to_speak_the_same(heard: Path, tiny_base, codes, example_dir, tmp_path: Path):
    """ZeRO-3, whose ranks speak unequally many prompts; the training goes on behind it."""
    speak = ["--eval.num_audio_samples", str(PROMPTS), "--eval.audio_every", "2", "--eval.max_audio_s", "1"]
    train(tmp_path / "run", tiny_base, codes, example_dir, *speak, "--zero.stage", "3")
    before = [sorted((run / "samples" / "step-00000000").glob("*.wav")) for run in (heard, tmp_path / "run")]
    assert len(before[0]) == PROMPTS
    for one, other in zip(*before, strict=True):
        assert one.read_bytes() == other.read_bytes()
    losses = [[line["loss"] for line in events(run, "step")] for run in (heard, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_the_samples_are_in_tensorboard(heard: Path):
    [file] = (heard / "tensorboard").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(file)).Reload()
    audio = log.Tags()["audio"]
    assert len(audio) == PROMPTS
    assert {event.step for tag in audio for event in log.Audio(tag)} == set(range(STEPS + 1))
    assert "samples/stop_rate" in log.Tags()["scalars"]


def test_no_key_of_the_environment_is_written(heard: Path):
    files = [path for path in heard.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pt" for path in files)
    assert not [path for path in files if b"s3cr3t-0f-a-tracker" in path.read_bytes()]


def test_a_checkpoint_exports_the_adapter_that_was_saved_beside_it(heard: Path, tmp_path: Path):
    step = f"step-{STEPS:08d}"
    export(heard / "checkpoints" / step, tmp_path / "exported")
    exported, saved = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "exported", heard / "adapters" / step)
    )
    assert exported.keys() == saved.keys()
    assert all(exported[name].dtype == saved[name].dtype for name in saved)
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    configs = [
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "exported", heard / "adapters" / step)
    ]
    assert configs[0] == configs[1]
    assert f"{STEPS} optimizer steps over {8 * STEPS} samples" in (tmp_path / "exported" / "README.md").read_text()


def test_a_native_base_trains_with_the_same_losses_and_speaking_changes_none(
    heard: Path, tiny_base: Path, codes: Path, example_dir: Path, tmp_path: Path
):
    native = tmp_path / "native"
    save_native_model(load_model(tiny_base, dtype=torch.float32), native, eos_token_id=504)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, native)
    shutil.copytree(tiny_base / "codec", native / "codec")
    said = train(tmp_path / "run", native, codes, example_dir, "--eval.num_audio_samples", "0")
    assert "in the format of transformers >= 5.3, converted while loading" in said
    for event in ("step", "eval"):
        first, second = (
            [{key: line[key] for key in line if "loss" in key or key == "grad_norm"} for line in events(run, event)]
            for run in (heard, tmp_path / "run")
        )
        assert first == second
        assert first


def test_a_run_ends_when_nothing_gets_better(tiny_base: Path, codes: Path, example_dir: Path, tmp_path: Path):
    """Hardly any learning rate: the codes' accuracy stays what it was before the first step."""
    stop = ["--eval.best_by", "code_accuracy", "--eval.patience", "2", "--run.max_steps", "9"]
    speak = ["--eval.num_audio_samples", "2", "--eval.audio_every", "1", "--eval.max_audio_s", "0.2"]
    run_dir = tmp_path / "run"
    said = train(run_dir, tiny_base, codes, example_dir, *speak, *stop, "--optim.learning_rate", "1e-12")
    assert "no better" in said
    assert [(line["step"], line["measure"]) for line in events(run_dir, "best")] == [(0, "code_accuracy")]
    assert events(run_dir, "end")[0]["reason"] == "no better"
    assert events(run_dir, "step")[-1]["step"] == 2
    assert sorted(path.name for path in (run_dir / "adapters").iterdir()) == ["best", "final", "step-00000002"]
