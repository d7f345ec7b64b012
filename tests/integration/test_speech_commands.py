"""generate and evaluate, as typed: on a CPU, with the tiny base and an adapter that was never trained."""

import json
import re
from pathlib import Path

import pytest
import soundfile

from ds_higgs.adapters.trained_prompt import TrainedPrompt
from ds_higgs.cli.main import run as run_command
from ds_higgs.commands.export import export
from ds_higgs.commands.generate import VoiceOptions, load_voice
from ds_higgs.errors import UserError
from ds_higgs.model.tiny import write_tiny_base
from tests.support.runs import write_run

CODEC_RATE = 24_000


@pytest.fixture(scope="module")
def run(tiny_base: Path, example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "voice"
    write_run(folder, tiny_base, val_manifest=example_dir / "val.json")
    return folder


@pytest.fixture
def generate(run: Path, tmp_path: Path, example_dir: Path):
    def speak(*options: str, name: str = "out.wav") -> bytes:
        reference = [
            "--reference",
            str(example_dir / "audio" / "speaker_001_00.flac"),
            "--reference-text",
            "The ferry.",
        ]
        out = tmp_path / name
        run_command(["generate", "--adapter", str(run), "--text", "مرحبا, hello", *reference, "-o", str(out), *options])
        return out.read_bytes()

    return speak


def test_a_text_becomes_a_wav(generate, tmp_path: Path, capsys: pytest.CaptureFixture):
    generate("--max-seconds", "1")
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.samplerate, info.channels, info.subtype) == (CODEC_RATE, 1, "PCM_16")
    seconds, ended = re.search(r"out.wav: ([\d.]+) s, (ended by the model|cut off)", capsys.readouterr().out).groups()
    assert float(seconds) == pytest.approx(info.duration, abs=0.04)  # a frame
    assert (ended == "cut off") == (seconds == "1.00")


def test_the_seed_decides(generate):
    first, again, other = (generate("--max-seconds", "1", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_adapter_step_and_reference_matter(generate, run: Path):
    greedy = ("--max-seconds", "1", "--temperature", "0")
    assert generate(*greedy) != generate(*greedy, "--step", "5")
    assert generate(*greedy) != generate(*greedy, "--reference-turn", "assistant")
    assert generate(*greedy) != generate(*greedy, "--cfg-scale", "3")


def test_a_manifest_is_spoken(run: Path, example_dir: Path, tmp_path: Path):
    out = tmp_path / "spoken"
    (out / "target").mkdir(parents=True)
    soundfile.write(out / "target" / "000.wav", [0.0] * 99, 24_000)  # of another manifest
    manifest, cache = str(example_dir / "val.json"), str(tmp_path / "codes")
    options = ["--count", "2", "--max-seconds", "0.5", "--cache-dir", cache]
    run_command(["generate", "--adapter", str(run), "--manifest", manifest, "-o", str(out), *options])
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == ["val.json:0", "val.json:7"]
    for row in rows:
        assert row["stopped_by"] in ("eos", "length")
        assert row["seconds"] <= 0.52
        target = soundfile.info(out / "target" / Path(row["file"]).name)
        assert row["duration_ratio"] == pytest.approx(row["seconds"] / target.duration)
        assert (out / "reference" / Path(row["file"]).name).is_file()


def test_checkpoints_are_compared_with_their_base(
    run: Path, tmp_path: Path, example_dir: Path, capsys: pytest.CaptureFixture
):
    questions = [[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}] for answer in "45"]
    (tmp_path / "text.json").write_text(json.dumps([{"messages": messages} for messages in questions]))
    options = ["--count", "1", "--max-seconds", "0.5", "--cache-dir", str(tmp_path / "codes")]
    options += ["--keep", str(tmp_path / "text.json")]
    run_command(["evaluate", str(run), "--sweep-scale", "0,1", *options])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["base", "voice@0", "voice"]
    record = json.loads((run / "evaluation" / "evaluation.json").read_text())
    base, nothing, adapted = (column["values"] for column in record["columns"])
    assert nothing == base
    assert base["audio_loss"] == pytest.approx(6.96, abs=0.02)
    assert base["audio_loss"] != adapted["audio_loss"]
    assert (base["forgotten"], nothing["forgotten"]) == (0, 0)
    assert adapted["forgotten"] == adapted["kept_loss"] - base["kept_loss"] != 0
    assert base["kept_text_loss"] != base["text_loss"]
    assert "kept_audio_loss" not in base  # there is none
    assert base["never_ending"] + base["early_ending"] <= base["num_spoken"] == 1
    assert any(line.startswith("base: of 1 samples spoken, ") for line in lines) == bool(
        base["never_ending"] + base["early_ending"] + base["repeating"]
    )
    assert any(f"{base['audio_loss']:.4f}" in line and f"{adapted['audio_loss']:.4f}" in line for line in lines)
    files = {column["name"]: column["samples"][0]["file"] for column in record["columns"]}
    assert files == {"base": "base/000.wav", "voice@0": "voice@0/000.wav", "voice": "voice/000.wav"}
    waveforms = {name: (run / "evaluation" / file).read_bytes() for name, file in files.items()}
    assert waveforms["base"] == waveforms["voice@0"] != waveforms["voice"]
    assert (run / "evaluation" / "voice" / "000.wav").is_file()


def test_manifests_and_losses_are_read_as_the_run_did(tiny_base: Path, example_dir: Path, tmp_path: Path):
    """The base's column too: otherwise the two would not be comparable."""
    data = {"on_bad_sample": "skip", "max_audio_s": 2.5, "use_delay_pattern": False, "reference_turn": "assistant"}
    run, cache = tmp_path / "voice", tmp_path / "codes"
    write_run(run, tiny_base, val_manifest=example_dir / "val.json", cache_dir=str(cache), **data)
    voice, loss = load_voice(VoiceOptions(adapter=run))
    assert (voice.rules.limits.max_seconds, voice.rules.layout.delay_pattern) == (2.5, False)
    assert (voice.on_bad_sample, voice.rules.reference_turn, voice.cache_dir) == ("skip", "assistant", cache)
    assert (loss.text_weight, loss.audio_weight) == (0.5, 2.0)
    voice, _ = load_voice(VoiceOptions(adapter=run, max_audio_s=9.0, on_bad_sample="error", codec=None))
    assert (voice.rules.limits.max_seconds, voice.on_bad_sample) == (9.0, "error")

    run_command(["evaluate", str(run), "--base", str(tiny_base), "--count", "1", "--max-seconds", "0.2"])
    record = json.loads((run / "evaluation" / "evaluation.json").read_text())
    for column in record["columns"]:
        values = column["values"]
        assert values["num_samples"] == 6  # of 8
        assert values["loss"] == pytest.approx(0.5 * values["text_loss"] + 2.0 * values["audio_loss"])


@pytest.mark.parametrize(
    ("trained", "asked", "warned"),
    [
        ({"prompt_form": "boson"}, {"prompt_form": "as_is"}, "prompt_form boson and is asked in the form as_is"),
        ({}, {"prompt_form": "boson"}, "prompt_form as_is and is asked in the form boson"),
        ({}, {"reference_turn": "assistant"}, "reference_turn as_is and is asked with assistant"),
        ({"prompt_form": "mixed"}, {"prompt_form": "as_is"}, None),
        ({"prompt_form": "mixed"}, {}, None),
    ],
)
def test_an_adapter_is_asked_in_the_form_that_it_was_trained_in(
    trained, asked, warned, tiny_base: Path, example_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_run(tmp_path / "run", tiny_base, **trained)
    export(tmp_path / "run", tmp_path / "adapter")
    voice, _ = load_voice(VoiceOptions(adapter=tmp_path / "adapter"))
    own = {"boson": "boson", "mixed": "boson"}.get(trained.get("prompt_form"), "as_is")
    assert voice.rules.prompt_form == own
    assert not caplog.records
    load_voice(VoiceOptions(adapter=tmp_path / "adapter", **asked))
    assert (warned or "") in caplog.text
    assert bool(caplog.records) == bool(warned)


def test_a_base_alone_is_asked_as_servers_do(tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    voice, _ = load_voice(VoiceOptions(base=str(tiny_base)))
    assert voice.rules.prompt_form == "boson"
    assert "is asked in the form boson, as servers do" in caplog.text
    caplog.clear()
    voice, _ = load_voice(VoiceOptions(base=str(tiny_base), prompt_form="as_is"))
    assert voice.rules.prompt_form == "as_is"
    assert "is asked in" not in caplog.text
    merged = tmp_path / "merged"
    merged.mkdir()
    for path in tiny_base.iterdir():
        (merged / path.name).symlink_to(path)
    TrainedPrompt().write(merged)  # as `export --merge` says in which form a run was trained
    voice, _ = load_voice(VoiceOptions(base=str(merged)))
    assert voice.rules.prompt_form == "as_is"


def test_a_base_alone_can_be_evaluated(tiny_base: Path, example_dir: Path, tmp_path: Path):
    where = ["--manifest", str(example_dir / "val.json"), "-o", str(tmp_path / "out")]
    options = ["--count", "1", "--max-seconds", "0.2", "--cache-dir", str(tmp_path / "codes")]
    run_command(["evaluate", "--base", str(tiny_base), *where, *options])
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [column["name"] for column in record["columns"]] == ["base"]


def test_a_base_with_a_whisper_tower_speaks_what_manifests_ask(example_dir: Path, tmp_path: Path):
    """A text with a reference would need what the tower hears of it."""
    write_tiny_base(tmp_path / "base", whisper=True)
    asked = ["generate", "--base", str(tmp_path / "base"), "--max-seconds", "0.2"]
    manifest = ["--manifest", str(example_dir / "val.json"), "--count", "2", "--cache-dir", str(tmp_path / "codes")]
    run_command([*asked, *manifest, "-o", str(tmp_path / "spoken")])
    assert len((tmp_path / "spoken" / "samples.jsonl").read_text().splitlines()) == 2
    reference = ["--reference", str(example_dir / "audio" / "speaker_001_00.flac"), "--reference-text", "The ferry."]
    with pytest.raises(UserError, match="not for a base with a Whisper tower"):
        run_command([*asked, "--text", "a", *reference, "-o", str(tmp_path / "x.wav")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--text", "a", "-o", "x.wav"], "no model"),
        (["generate", "--adapter", "RUN", "--text", " ", "-o", "x.wav"], "the text to speak is empty"),
        (["generate", "--adapter", "RUN", "--text", "a", "-o", "x.wav", "--reference", "no.wav"], "no.wav"),
        (["generate", "--adapter", "RUN", "--text", "a", "-o", "x.wav", "--cfg-scale", "2"], "with --text and --refer"),
        (["generate", "--adapter", "RUN", "--text", "a", "-o", "x.mp3"], "expected a name that ends with .wav"),
        (["generate", "--adapter", "RUN", "--text", "a", "-o", "/proc/x.wav"], "--out: /proc cannot be written"),
        (["generate", "--adapter", "RUN", "--manifest", "m", "-o", "x", "--reference", "r"], "go with --text"),
        (["generate", "--adapter", "nowhere", "--text", "a", "-o", "x.wav"], "nowhere: not the folder of a run"),
        (
            ["generate", *["--adapter", "RUN", "--text", "a", "-o", "x.wav", "--sampler", "vllm-omni", "--top-k", "5"]],
            "of its own",
        ),
        (["evaluate"], "nothing to evaluate"),
        (["evaluate", "RUN", "--no-base", "--keep", "m.json"], "--keep compares with the base"),
        (["generate", "--base", "BASE", "--text", "a", "-o", "x.wav", "--lora-scale", "0"], "--lora-scale: no adapter"),
        (["evaluate", "--base", "BASE", "-o", "x"], "nothing to evaluate on"),
        (["export", "RUN", "-o", "RUN"], "expected a new or empty folder"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, run: Path, tiny_base: Path):
    places = {"RUN": str(run), "BASE": str(tiny_base)}
    with pytest.raises(UserError, match=message):
        run_command([places.get(argument, argument) for argument in arguments])
