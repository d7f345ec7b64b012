"""`train` end to end on the example voices: real launchers, real model, real audio, and what a run leaves behind."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel

from ds_higgs import setup
from ds_higgs.batch import IGNORE_INDEX, MODEL_INPUT_NAMES
from ds_higgs.config.file import load_config
from ds_higgs.data.collation import BatchCollator
from ds_higgs.job.distributed import Ranks
from ds_higgs.model.loading import HiggsAudioModel
from tests.support import launching
from tests.support.launching import ROOT
from tests.support.parity import ROUNDING

EXAMPLE = ROOT / "examples" / "voice_cloning"
CONFIG = EXAMPLE / "config.yaml"
GOLDEN = ROOT / "tests" / "golden" / "example_losses.json"
STEP_KEYS = {
    *("event", "step", "epoch", "loss", "text_loss", "audio_loss", "audio_loss_per_codebook", "learning_rate"),
    *("grad_norm", "num_samples", "num_tokens", "num_text_targets", "num_audio_targets", "step_time_s"),
    *("samples_per_second", "tokens_per_second", "peak_memory_gib"),
}


@pytest.fixture(scope="session")
def codes(tmp_path_factory) -> Path:
    """One code cache for all runs."""
    return tmp_path_factory.mktemp("codes")


def build_arguments(run_dir: Path, tiny_base: Path, codes: Path, **overrides) -> list[str]:
    """Arguments of a run of the example; `section__key` for a key."""
    values = {
        "run.output_dir": run_dir,
        "model.base": tiny_base,
        "data.cache_dir": codes,
        "logging.tensorboard": "false",
        "eval.eval_steps": 1000,
        "eval.num_audio_samples": 0,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    flags = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    return ["train", "-c", str(CONFIG), *flags]


@pytest.fixture
def arguments(tiny_base, codes, tmp_path):
    """Arguments of a run in this test's own folder."""

    def build(run: str = "run", **overrides) -> list[str]:
        return build_arguments(tmp_path / run, tiny_base, codes, **overrides)

    return build


# Four steps in fp32, whose numbers depend on the CPU by rounding alone (see ROUNDING), in the manifest's own form.
SMOOTH = {
    "data__prompt_form": "as_is",
    "run__max_steps": 4,
    "zero__precision": "fp32",
    "optim__warmup_steps": 2,
    "optim__learning_rate": 0.01,
    "optim__eps": 0.01,
    "optim__schedule": "linear",
}


@pytest.fixture(scope="session")
def plain_run(tiny_base, codes, tmp_path_factory) -> Path:
    """The smooth run in one process, no launcher, with a spy on the model's forward (spy.json)."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    command = build_arguments(run_dir, tiny_base, codes, **SMOOTH)
    spy = ROOT / "tests" / "integration" / "workers" / "spy.py"
    train([sys.executable, spy, run_dir.parent / "spy.json", *command])
    return run_dir


def events(run_dir: Path, event: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def train(command: list, *, status: int = 0) -> str:
    done = launching.run(command)
    assert done.returncode == status, done.stdout[-6000:]
    return done.stdout


def steps(run_dir: Path) -> list[tuple]:
    """What must be equal, bit for bit, in two runs of the same training."""
    return [
        (s["step"], s["loss"], s["text_loss"], s["audio_loss"], s["grad_norm"], s["num_audio_targets"])
        for s in events(run_dir, "step")
    ]


# Two ranks, bf16, dropout on, data workers, both prompt forms; 9 steps, of which the saves are no ends of epochs.
WHOLE = {
    "data__prompt_form": "mixed",
    "data__num_workers": 1,
    "lora__dropout": 0.2,
    "run__epochs": 3,
    "eval__eval_steps": 4,
    "checkpoint__save_steps": 4,
    "checkpoint__keep_adapters": 2,
}


@pytest.fixture(scope="session")
def whole_run(tiny_base, codes, tmp_path_factory) -> Path:
    """A run under the `deepspeed` launcher that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    command = launching.deepspeed(2, "--module", "ds_higgs", *build_arguments(run_dir, tiny_base, codes, **WHOLE))
    port = command[command.index("--master_port") + 1]
    train(command)
    assert not list(Path("/dev/shm").glob(f"*_{port}_*"))
    return run_dir


def test_a_run_on_two_ranks_leaves_what_it_promises(whole_run):
    run_dir = whole_run
    found = events(run_dir, "step")
    assert [line["step"] for line in found] == list(range(1, 10))
    assert set(found[0]) >= STEP_KEYS
    assert all(len(line["audio_loss_per_codebook"]) == 8 for line in found)
    assert [line["step"] for line in events(run_dir, "eval")] == [0, 4, 8, 9]
    assert [line["step"] for line in events(run_dir, "checkpoint")] == [4, 8, 9]
    assert events(run_dir, "end")[0]["reason"] == "done"
    by_epoch = {epoch: [line for line in found if line["epoch"] == epoch] for epoch in (1, 2, 3)}
    targets = {sum(line["num_audio_targets"] for line in lines) for lines in by_epoch.values()}
    assert len(targets) == 1
    assert targets.pop() > 0
    assert {sum(line["num_samples"] for line in lines) for lines in by_epoch.values()} == {24}
    assert all(line["audio_loss"] > 0 for line in found)
    evaluations = [line["audio_loss"] for line in events(run_dir, "eval")]
    assert evaluations[-1] < 0.9 * evaluations[0]
    assert sorted(path.name for path in (run_dir / "adapters").iterdir()) == [
        "final",
        "step-00000008",
        "step-00000009",
    ]
    record = json.loads((run_dir / "adapters" / "final" / "training.json").read_text())
    assert {**record, "losses": None, "config": None} == {
        **{"step": 9, "seed": 0, "samples": 72, "losses": None, "losses_are_of": "validation", "config": None},
        "audio_targets": sum(line["num_audio_targets"] for line in found),
    }
    assert record["losses"] == {key: events(run_dir, "eval")[-1][key] for key in ("loss", "text_loss", "audio_loss")}
    assert record["config"] == yaml.safe_load((run_dir / "config.yaml").read_text())
    given = json.loads((run_dir / "ds_config.json").read_text())
    assert given["zero_optimization"]["stage"] == 2
    assert given["bf16"]["enabled"] is True
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run"]["epochs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local rank -1", "torchrun"])
def test_every_launcher_trains(launcher, arguments, tmp_path):
    short = arguments(run__max_steps=2)
    if launcher == "torchrun":
        train(launching.torchrun(2, "-m", "ds_higgs", *short))
    else:
        done = launching.run(launching.ds_higgs(*short), env={"LOCAL_RANK": "-1"})
        assert done.returncode == 0, done.stdout[-4000:]
    assert len(events(tmp_path / "run", "step")) == 2


def test_resuming_gives_the_same_losses_bit_for_bit(whole_run, arguments, tmp_path):
    """From the middle of an epoch, as if it had been killed at step 5."""
    parts = tmp_path / "parts"
    shutil.copytree(whole_run, parts)
    for step in (8, 9):
        shutil.rmtree(parts / "checkpoints" / f"step-{step:08d}")
    (parts / "failure.txt").write_text("killed")

    done = launching.run_ranks(2, "-m", "ds_higgs", *arguments("parts", **WHOLE))
    assert done.returncode == 0, done.stdout[-6000:]

    assert steps(parts) == steps(whole_run)
    assert len(steps(whole_run)) == 9
    assert events(parts, "resume")[0]["step"] == 4
    for file in ("adapters/final/adapter_model.safetensors", "adapters/step-00000008/adapter_model.safetensors"):
        assert (parts / file).read_bytes() == (whole_run / file).read_bytes()
    records = [json.loads((run / "adapters/final/training.json").read_text()) for run in (parts, whole_run)]
    assert {**records[0], "config": None} == {**records[1], "config": None}
    left = [sorted(path.name for path in (run / "adapters").iterdir()) for run in (whole_run, parts)]
    assert left[0] == ["final", "step-00000008", "step-00000009"]
    assert left[1] == [*left[0], "superseded"]
    aside = sorted(path.name for path in (parts / "adapters" / "superseded").iterdir())
    assert aside == ["final-1", "step-00000008-1", "step-00000009-1"]
    assert not (parts / "failure.txt").exists()
    assert (parts / "failure-mended.txt").read_text() == "killed"


@pytest.mark.slow
def test_zero_stages_give_the_same_losses(arguments, tmp_path):
    losses, measured = {}, {}
    for stage in (0, 1, 2, 3):
        run = f"stage{stage}"
        command = arguments(run, run__max_steps=5, zero__stage=stage, lora__dropout=0, optim__learning_rate=5e-4)
        train(launching.deepspeed(2, "--module", "ds_higgs", *command))
        losses[stage] = [line["loss"] for line in events(tmp_path / run, "step")]
        [*_, last] = events(tmp_path / run, "eval")
        measured[stage] = [last[key] for key in ("eos_probability", "onset_audio_loss", "end_tokens_loss")]
    for stage in (0, 1, 3):
        assert losses[stage] == pytest.approx(losses[2], rel=2e-3)
        assert measured[stage] == pytest.approx(measured[2], rel=5e-3)


def test_final_adapter_in_peft_is_the_trained_model(plain_run, tiny_base, codes):
    """Stock model and PEFT, from the adapter's files: the weights of the checkpoint, the trainer's validation loss."""
    adapter = plain_run / "adapters" / "final"
    assert not list(adapter.glob("*.bin"))
    model = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(tiny_base), adapter).eval()

    states = plain_run / "checkpoints" / "step-00000004" / "mp_rank_00_model_states.pt"
    trained = torch.load(states, weights_only=False)["module"]
    loaded = dict(model.named_parameters())
    assert any("lora_" in name for name in trained)
    assert any("modules_to_save" in name for name in trained)
    for name, weight in trained.items():
        assert torch.equal(loaded[name.removeprefix("peft_model.")], weight), name

    assert plain_validation_loss(model, tiny_base, codes) == pytest.approx(
        events(plain_run, "eval")[-1]["audio_loss"], rel=1e-5
    )


def test_validation_tells_of_ends_and_onsets(plain_run):
    last = events(plain_run, "eval")[-1]
    assert last["num_ends"] == 8
    assert 0 < last["eos_probability"] < 0.1  # four steps teach no end
    assert last["audio_loss"] == pytest.approx(last["onset_audio_loss"], abs=0.3)
    kinds = [last[f"{name}_loss"] for name in ("words", "audio_start", "end_tokens")]
    assert min(kinds) < last["text_loss"] < max(kinds)


def test_first_step_equals_plain_code_on_the_same_batch(plain_run, tiny_base):
    """The model is called with `label_ids` and places the text labels itself; a loop runs over the codebooks.

    LoRA starts at zero, so the base model alone gives the first step's losses, whatever dropout drew.
    """
    config = load_config(plain_run / "config.yaml", {})
    rules = setup.build_sample_rules(config.data, tiny_base)
    dataset = setup.build_dataset(config, config.data.train_manifest, rules, Ranks(0, 1, 0))
    [batch] = next(iter(setup.build_train_loader(config, [dataset], rules, Ranks(0, 1, 0))))
    model = HiggsAudioModel.from_pretrained(tiny_base)
    with torch.no_grad():
        outputs = model(**batch.model_inputs, label_ids=batch.labels.text, use_cache=False)
    labels = outputs.expanded_labels[:, 1:]
    text = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten())
    codebooks = [F.cross_entropy(outputs.audio_logits[:-1, c], batch.labels.audio[c, 1:]) for c in range(8)]

    first = events(plain_run, "step")[0]
    assert first["text_loss"] == pytest.approx(text.item(), rel=1e-5)
    assert first["audio_loss_per_codebook"] == pytest.approx([loss.item() for loss in codebooks], rel=1e-5)
    assert first["audio_loss"] == pytest.approx(sum(codebooks).item() / 8, rel=1e-5)


def test_the_model_sees_no_labels_in_training_or_validation(plain_run):
    calls = json.loads((plain_run.parent / "spy.json").read_text())
    assert {call["training"] for call in calls} == {True, False}
    for call in calls:
        assert set(call["arguments"]) <= {*MODEL_INPUT_NAMES, "use_cache"}
        assert {"input_ids", "audio_out_ids"} <= set(call["arguments"])


def test_learning_rate_in_metrics_follows_the_schedule(plain_run):
    rates = [line["learning_rate"] for line in events(plain_run, "step")]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert all(math.isfinite(line["grad_norm"]) for line in events(plain_run, "step"))


def golden_values(run_dir: Path) -> list[dict]:
    keys = ("step", "loss", "text_loss", "audio_loss", "grad_norm", "num_text_targets", "num_audio_targets")
    return [{key: line[key] for key in keys} for line in events(run_dir, "step")]


def assert_golden(run_dir: Path) -> None:
    for line, expected in zip(golden_values(run_dir), json.loads(GOLDEN.read_text()), strict=True):
        assert line == pytest.approx(expected, rel=ROUNDING)


def test_losses_are_the_golden_ones(plain_run):
    """To be renewed on purpose only: DS_HIGGS_UPDATE_GOLDEN=1."""
    if os.environ.get("DS_HIGGS_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden_values(plain_run), indent=1) + "\n")
    assert_golden(plain_run)


def test_losses_are_the_golden_ones_on_an_older_cpu(arguments, tmp_path):
    """The plainest instruction set that torch and oneDNN know, against whatever this machine has."""
    plainest = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    command = launching.ds_higgs(*arguments(**SMOOTH, data__val_manifest="null", checkpoint__save_steps=1000))
    done = launching.run(command, env=plainest)
    assert done.returncode == 0, done.stdout[-4000:]
    assert_golden(tmp_path / "run")


def plain_validation_loss(model: PeftModel, base: Path, codes: Path) -> float:
    """Mean audio loss over the validation manifest, one sample at a time, the stock forward, a loop over codebooks."""
    changes = {"model.base": str(base), "data.cache_dir": str(codes), "data.prompt_form": "as_is"}
    config = load_config(CONFIG, changes)
    rules = setup.build_sample_rules(config.data, base)
    dataset = setup.build_dataset(config, config.data.val_manifest, rules, Ranks(0, 1, 0))
    collate = BatchCollator(rules.layout)
    sums, counts = torch.zeros(8), torch.zeros(8)
    for index in range(len(dataset)):
        batch = collate([dataset[index]], [dataset.sample_id(index)])
        with torch.no_grad():
            logits = model(**batch.model_inputs, use_cache=False).audio_logits
        for c in range(8):
            target = batch.labels.audio[c, 1:]
            sums[c] += F.cross_entropy(logits[:-1, c], target, reduction="sum")
            counts[c] += (target != IGNORE_INDEX).sum()
    return (sums / counts).mean().item()


def test_mistakes_exit_2_with_one_message_and_no_run_folder(arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    broken = json.loads((EXAMPLE / "train.json").read_text())
    broken[3]["messages"][-1]["content"][-1]["audio_url"] = "audio/none.flac"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    cases = {
        ("--data.train_manifest", str(tmp_path / "none.json")): "none.json",
        ("--data.train_manifest", str(tmp_path / "broken.json"), "--data.audio_root", str(EXAMPLE)): "none.flac",
        ("--model.base", str(tmp_path / "empty")): "not a Higgs Audio checkpoint",
        ("--checkpoint.resume", str(tmp_path / "nowhere")): "nowhere",
        ("--memory.kernels", "liger"): "liger",
    }
    for extra, expected in cases.items():
        done = launching.run_ds_higgs(*arguments(), *extra)
        assert done.returncode == 2, done.stdout
        assert expected in done.stdout, extra
        assert "Traceback" not in done.stdout, done.stdout
        assert not (tmp_path / "run").exists(), extra


def test_a_fork_with_labels_is_refused_before_loading(arguments, tmp_path):
    """A stand-in for the community fork: the same package with `labels` in its forward, first on the path."""
    import boson_multimodal

    fork = tmp_path / "fork" / "boson_multimodal"
    shutil.copytree(Path(boson_multimodal.__path__[0]), fork)
    modeling = fork / "model" / "higgs_audio" / "modeling_higgs_audio.py"
    source = modeling.read_text()
    assert source.count("reward: Optional[torch.FloatTensor] = None,\n    ):") == 1
    modeling.write_text(
        source.replace(
            "reward: Optional[torch.FloatTensor] = None,\n    ):",
            "reward: Optional[torch.FloatTensor] = None,\n        labels=None,\n    ):",
        )
    )
    done = launching.run(launching.ds_higgs(*arguments()), env={"PYTHONPATH": f"{tmp_path / 'fork'}:{ROOT}"})
    assert done.returncode == 2, done.stdout[-3000:]
    assert str(modeling) in done.stdout
    assert "labels" in done.stdout
    assert "Traceback" not in done.stdout
