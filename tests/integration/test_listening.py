"""A run that speaks while it trains: what it writes, what judges hear, that training does not notice. A native base."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import jiwer
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_higgs.adapters.native import save_native_model
from ds_higgs.commands.export import export
from ds_higgs.data.prompts import spoken_text
from ds_higgs.model.loading import load_model
from ds_higgs.speech.transcripts import normalise_text
from tests.support import launching
from tests.support.judges import write_speaker_model, write_whisper

RANKS, STEPS, PROMPTS = 2, 2, 3
SECRETS = dict.fromkeys(("WANDB_API_KEY", "COMET_API_KEY", "HF_TOKEN"), "s3cr3t-0f-a-tracker")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


def train(
    run_dir: Path,
    base: Path,
    codes: Path,
    example_dir: Path,
    *options: str,
    program: str = "ds_higgs",
    environment: Mapping[str, str] | None = None,
) -> str:
    config = str(example_dir / "config.yaml")
    paths = ["--run.output_dir", str(run_dir), "--model.base", str(base), "--data.cache_dir", str(codes)]
    command = ["train", "-c", config, *paths, "--run.max_steps", str(STEPS), *options]
    done = launching.run_ranks(RANKS, "-m", program, *command, env=SECRETS | dict(environment or {}))
    assert done.returncode == 0, done.stdout[-6000:]
    assert "s3cr3t-0f-a-tracker" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that have a small Whisper and a small x-vector model listen."""
    folder = tmp_path_factory.mktemp("judges")
    models = {
        "asr": write_whisper(folder / "whisper"),
        "speaker_model": write_speaker_model(folder / "xvector"),
        "language": "arabic",
    }
    return [word for key, value in models.items() for word in (f"--eval.{key}", str(value))]


@pytest.fixture(scope="module")
def heard(
    tiny_base: Path, codes: Path, example_dir: Path, judged: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run on two ranks that speaks three prompts before the first step and after each, with judges."""
    run_dir = tmp_path_factory.mktemp("runs") / "heard"
    speak = ["--eval.num_audio_samples", str(PROMPTS), "--eval.audio_every", "1", "--eval.max_audio_s", "1"]
    train(run_dir, tiny_base, codes, example_dir, *speak, *judged)
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


def test_judges_hear_every_prompt_and_the_errors_of_all_ranks_are_summed(heard: Path):
    rows = events(heard, "sample")
    for row in rows:
        assert row["word_errors"]["length"] == len(normalise_text(row["text"]).split())
        assert -1 <= row["speaker_similarity"] <= 1
    lines = events(heard, "listening")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines:
        own = [row for row in rows if row["step"] == line["step"]]
        edits, words = (sum(row["word_errors"][key] for row in own) for key in ("edits", "length"))
        assert line["word_error_rate"] == edits / words
        similarities = [row["speaker_similarity"] for row in own]
        assert line["speaker_similarity"] == pytest.approx(sum(similarities) / PROMPTS)


@pytest.mark.slow
def test_split_weights_are_gathered_to_speak_the_same(
    heard: Path, tiny_base, codes, example_dir, judged, tmp_path: Path
):
    """ZeRO-3, whose ranks speak unequally many prompts; the training goes on behind it."""
    speak = ["--eval.num_audio_samples", str(PROMPTS), "--eval.audio_every", "2", "--eval.max_audio_s", "1"]
    train(tmp_path / "run", tiny_base, codes, example_dir, *speak, *judged, "--zero.stage", "3")
    before = [sorted((run / "samples" / "step-00000000").glob("*.wav")) for run in (heard, tmp_path / "run")]
    assert len(before[0]) == PROMPTS
    for one, other in zip(*before, strict=True):
        assert one.read_bytes() == other.read_bytes()
    judgements = [[line for line in events(run, "listening") if line["step"] == 0] for run in (heard, tmp_path / "run")]
    assert judgements[0] == judgements[1]
    losses = [[line["loss"] for line in events(run, "step")] for run in (heard, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_the_samples_are_in_tensorboard(heard: Path):
    [file] = (heard / "tensorboard").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(file)).Reload()
    audio = log.Tags()["audio"]
    assert len(audio) == PROMPTS
    assert {event.step for tag in audio for event in log.Audio(tag)} == set(range(STEPS + 1))
    names = ("stop_rate", "word_error_rate", "character_error_rate", "speaker_similarity")
    assert {f"samples/{name}" for name in names} <= set(log.Tags()["scalars"])


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


def test_a_native_base_trains_with_the_same_losses_and_judged_speech_changes_none(
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


def test_the_best_is_what_the_judge_prefers_and_patience_is_kept_over_a_resume(
    tiny_base: Path, codes: Path, example_dir: Path, tmp_path: Path
):
    """Planted: step 1 is heard best. Its adapter stays, and after two worse ones, of two starts, the run ends."""
    text = spoken_text(json.loads((example_dir / "val.json").read_text())[0])
    planted = {"0": "", "1": text, "2": "nothing of it", "3": ""}
    judged = ["--eval.asr", "planted", "--eval.best_by", "word_error_rate", "--eval.patience", "2"]
    speak = ["--eval.num_audio_samples", str(PROMPTS), "--eval.audio_every", "1", "--eval.max_audio_s", "0.2"]
    run_dir = tmp_path / "run"
    for steps in ("2", "9"):
        said = train(
            *(run_dir, tiny_base, codes, example_dir, *speak, *judged, "--run.max_steps", steps),
            program="tests.integration.workers.planted_judge",
            environment={"PLANTED": json.dumps(planted)},
        )
    assert "no better" in said
    assert [(line["step"], line["measure"]) for line in events(run_dir, "best")] == [
        (0, "word_error_rate"),
        (1, "word_error_rate"),
    ]
    assert json.loads((run_dir / "adapters" / "best" / "training.json").read_text())["step"] == 1
    assert [line["reason"] for line in events(run_dir, "end")] == ["no better"]
    assert events(run_dir, "step")[-1]["step"] == 3
    adapters = ["best", "final", "step-00000002", "step-00000003", "superseded"]  # the final one of the first start
    assert sorted(path.name for path in (run_dir / "adapters").iterdir()) == adapters

    for line in events(run_dir, "listening"):
        rows = [row for row in events(run_dir, "sample") if row["step"] == line["step"]]
        assert all(row["heard"] == planted[str(row["step"])] for row in rows if row["seconds"])
        texts, hypotheses = ([normalise_text(row[key]) for row in rows] for key in ("text", "heard"))
        assert line["word_error_rate"] == pytest.approx(jiwer.wer(texts, hypotheses))
        texts, hypotheses = ([one.replace(" ", "") for one in side] for side in (texts, hypotheses))
        assert line["character_error_rate"] == pytest.approx(jiwer.cer(texts, hypotheses))
