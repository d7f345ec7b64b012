"""`ds-higgs manifest`: each of the forms becomes a manifest that trains; references and splits."""

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ds_higgs.cli.main import run
from ds_higgs.commands.manifest import make_manifests
from ds_higgs.data.build import build_dataset
from ds_higgs.data.sources.splitting import pick_references, split
from ds_higgs.data.sources.tables import read_table
from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.data.sources.writing import _path_from
from ds_higgs.errors import UserError
from tests.support import launching

from .audio_files import tone, write_tone

SPEAKERS = ("anna", "omar")
PER_SPEAKER = 4
FORMS = ("pairs", "table", "swift", "lines", "nemo", "metadata", "datasets", "webdataset")


def utterances():
    """(speaker, name, text) of a small set."""
    return [
        (speaker, f"{speaker}_{index}", f"Sentence {index} of {speaker}, سلام.")
        for speaker in SPEAKERS
        for index in range(PER_SPEAKER)
    ]


def write_audio(folder: Path, name: str) -> Path:
    number = [known for _, known, _ in utterances()].index(name)
    return write_tone(folder / f"{name}.wav", 0.3 + 0.05 * number, pitch=150 + 20 * number, seed=number)


def write_source(folder: Path, form: str) -> Path:
    """The small set in one of the forms; what `ds-higgs manifest` is pointed at."""
    folder.mkdir()
    if form == "pairs":
        for speaker, name, text in utterances():
            write_audio(folder / speaker, name)
            (folder / speaker / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        return folder
    if form == "datasets":
        return write_datasets_folder(folder)
    if form == "webdataset":
        return write_shards(folder)
    for _, name, _ in utterances():
        write_audio(folder / "wavs", name)
    if form == "table":
        lines = [f"{name}|{text}|{speaker}" for speaker, name, text in utterances()]
        path = folder / "list.csv"
        path.write_text("audio|text|speaker\n" + "\n".join(lines) + "\n", encoding="utf-8")
    elif form == "swift":
        path = folder / "train.jsonl"
        lines = [
            {
                "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "<audio>"}],
                "audios": [f"wavs/{name}.wav"],
                "speaker": speaker,
            }
            for speaker, name, text in utterances()
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif form in ("lines", "nemo"):
        path = folder / "train.jsonl"
        key = "audio" if form == "lines" else "audio_filepath"
        lines = [
            {key: f"wavs/{name}.wav", "text": text, "speaker": speaker, "duration": 0.3}
            for speaker, name, text in utterances()
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path = folder / "metadata.json"
        samples = []
        for speaker, name, text in utterances():
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
            sample = {"audio_file": f"wavs/{name}.wav", "transcript_file": f"{name}.txt", "speaker_id": speaker}
            samples.append(sample)
        path.write_text(json.dumps({"dataset_info": {}, "samples": samples}))
    return path


def write_datasets_folder(folder: Path) -> Path:
    """As Dataset.save_to_disk writes it: an Arrow stream, audio inside; and a Parquet shard beside it."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"audio": {"bytes": write_audio(folder / "tmp", name).read_bytes(), "path": f"{name}.wav"}, "text": text,
         "speaker_id": speaker}
        for speaker, name, text in utterances()
    ]  # fmt: skip
    shutil.rmtree(folder / "tmp")
    audio = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("audio", audio), ("text", pyarrow.string()), ("speaker_id", pyarrow.string())])
    half = len(rows) // 2
    table = pyarrow.Table.from_pylist(rows[:half], schema=schema)
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", schema) as writer:
        writer.write_table(table)
    parquet.write_table(pyarrow.Table.from_pylist(rows[half:], schema=schema), folder / "more.parquet")
    return folder


def write_shards(folder: Path) -> Path:
    """Two tar archives; the text lies in a .txt in one, in a .json in the other."""
    files = folder / "tmp"
    for number, (speaker, name, text) in enumerate(utterances()):
        write_audio(files, name)
        described = {"speaker": speaker} if number % 2 else {"speaker": speaker, "text": text}
        (files / f"{name}.json").write_text(json.dumps(described))
        if number % 2:
            (files / f"{name}.txt").write_text(text, encoding="utf-8")
    for speaker in SPEAKERS:
        with tarfile.open(folder / f"{speaker}.tar", "w") as archive:
            for path in sorted(files.glob(f"{speaker}*")):
                archive.add(path, f"clips/{path.name}")
    shutil.rmtree(files)
    return folder


def contents(sample, kind):
    """role, text or path of the items of a kind."""
    return [
        (message["role"], item["text" if kind == "text" else "audio_url"])
        for message in sample["messages"]
        if isinstance(message["content"], list)
        for item in message["content"]
        if item["type"] == kind
    ]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_becomes_a_manifest_that_trains(tmp_path, make_rules, form, capsys):
    source = write_source(tmp_path / "source", form)
    out = tmp_path / "made" / "train.json"
    run(["manifest", str(source), "-o", str(out)])

    assert f"{out}: 8 samples of 2 speakers\n" in capsys.readouterr().out
    samples = json.loads(out.read_text())
    texts = {text: speaker for speaker, _, text in utterances()}
    for sample in samples:
        (_, said), (_, request), (_, text) = contents(sample, "text")
        assert request == f"Please generate speech for: {text}"
        assert texts[said] == texts[text] == sample["speaker"]
        assert said != text
        (role, reference), (target_role, target) = contents(sample, "audio")
        assert (role, target_role) == ("user", "assistant")
        assert reference != target
    assert len({contents(sample, "text")[2] for sample in samples}) == 8
    dataset = build_dataset(out, rules=make_rules(), cache_dir=tmp_path / "cache")
    assert len(dataset) == 8
    assert all(dataset.count_targets(index)[1] > 0 for index in range(8))
    as_assistant = build_dataset(out, rules=make_rules(reference_turn="assistant"), cache_dir=tmp_path / "cache")
    assert len(as_assistant) == 8


@pytest.mark.parametrize("form", ["datasets", "webdataset"])
def test_audio_in_larger_files_stays_there(tmp_path, form):
    made, *_ = make_manifests(write_source(tmp_path / "source", form), tmp_path / "made" / "train.json")
    named = [path for sample in json.loads(made.path.read_text()) for _, path in contents(sample, "audio")]
    inside = {"datasets": r"\.\./source/[\w.-]+::audio\[\d\]", "webdataset": r"\.\./source/\w+\.tar::clips/\w+\.wav"}
    assert all(re.fullmatch(inside[form], path) for path in named)
    assert [path.name for path in made.path.parent.iterdir()] == ["train.json"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_each_forms_manifest_is_trained_on(tmp_path, tiny_base, form):
    out = tmp_path / "made" / "train.json"
    run(["manifest", str(write_source(tmp_path / "source", form)), "-o", str(out)])
    keys = {
        "run.output_dir": tmp_path / "run",
        "run.max_steps": 2,
        "model.base": tiny_base,
        "data.train_manifest": out,
        "data.cache_dir": tmp_path / "codes",
    }
    flags = [part for key, value in keys.items() for part in (f"--{key}", value)]
    done = launching.run_ds_higgs("train", *flags)
    assert done.returncode == 0, done.stdout[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["num_audio_targets"] > 0 for line in lines if line["event"] == "step"] == [True, True]


def test_ljspeechs_own_table_has_no_header_and_one_speaker(tmp_path):
    for index in range(3):
        write_tone(tmp_path / "LJ" / "wavs" / f"LJ-{index}.wav", 0.3, pitch=100 + 50 * index)
    rows = ['LJ-0|He said "no" 3 times|He said "no" three times', "LJ-1|Yes, indeed", "LJ-2|a|b"]
    (tmp_path / "LJ" / "metadata.csv").write_text("\n".join(rows))
    (made,) = make_manifests(tmp_path / "LJ", tmp_path / "train.jsonl")
    samples = [json.loads(line) for line in made.path.read_text().splitlines()]
    assert [contents(sample, "text")[-1][1] for sample in samples] == ['He said "no" three times', "Yes, indeed", "b"]
    assert {sample["speaker"] for sample in samples} == {"LJ"}
    assert contents(samples[0], "audio")[1][1] == "LJ/wavs/LJ-0.wav"


def test_a_quoted_comma_table_is_read_too(tmp_path):
    write_tone(tmp_path / "a.wav")
    (tmp_path / "list.csv").write_text('file_name,text\na.wav,"One, two"\n')
    (made,) = make_manifests(tmp_path / "list.csv", tmp_path / "train.json")
    (sample,) = json.loads(made.path.read_text())
    assert contents(sample, "text")[-1][1] == "One, two"
    assert made.num_without_reference == 1


def test_the_references_that_a_form_names_are_kept(tmp_path):
    source = write_source(tmp_path / "source", "metadata")
    data = json.loads(source.read_text())
    named = {"ref_audio_file": "wavs/anna_3.wav", "ref_transcript": "What it says."}
    data["samples"][0] |= named
    source.write_text(json.dumps(data))
    (made,) = make_manifests(source, tmp_path / "source" / "train.json")
    sample = json.loads(made.path.read_text())[0]
    assert contents(sample, "audio")[0] == ("user", "wavs/anna_3.wav")
    assert contents(sample, "text")[0] == ("user", "What it says.")


def test_a_whole_swift_sample_keeps_its_messages(tmp_path):
    write_tone(tmp_path / "a.wav")
    write_tone(tmp_path / "b.wav", pitch=300)
    messages = [
        {"role": "user", "content": "This says one. <audio> Now say two."},
        {"role": "assistant", "content": "two <audio>"},
    ]
    (tmp_path / "s.jsonl").write_text(json.dumps({"messages": messages, "audios": ["a.wav", "b.wav"]}))
    (made,) = make_manifests(tmp_path / "s.jsonl", tmp_path / "train.json")
    (sample,) = json.loads(made.path.read_text())
    assert [item["type"] for item in sample["messages"][0]["content"]] == ["text", "audio", "text"]
    assert contents(sample, "audio") == [("user", "a.wav"), ("assistant", "b.wav")]


def test_references_depend_on_the_seed_alone_and_are_never_the_target():
    speech = [Utterance(Path(f"/{index}.wav"), str(index), f"s{index % 3}", "") for index in range(60)]
    first, again, other = (pick_references(speech, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    for utterance, reference in first:
        assert reference is not None
        assert reference.audio != utterance.audio
        assert reference.speaker == utterance.speaker
    assert len({reference.audio for _, reference in first}) > 25


def test_one_recording_alone_or_twice_has_no_reference():
    alone = [Utterance(Path("/a.wav"), "a", "s", ""), Utterance(Path("/b.wav"), "b", None, "")]
    twice = [Utterance(Path("/c.wav"), text, "t", "") for text in ("c", "C")]
    assert [reference for _, reference in pick_references([*alone, *twice], seed=0)] == [None] * 4


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_split_shares_no_recording_and_leaves_references_on_both_sides(share, seed):
    speech = [Utterance(Path(f"/{index}.wav"), str(index), f"s{index % 7}", "") for index in range(140)]
    bound = [
        Utterance(Path(f"/bound{index}.wav"), "", "s0", "", reference=Path(f"/ref{index // 5}.wav"), reference_text="r")
        for index in range(20)
    ]
    training, validation = split(speech + bound, share=share, seed=seed)
    assert sorted(training + validation, key=str) == sorted(speech + bound, key=str)
    used = [{audio for utterance in part for audio in utterance.audio_files()} for part in (training, validation)]
    assert used[0].isdisjoint(used[1])
    assert [{utterance.speaker for utterance in part} for part in (training, validation)] == [
        {f"s{number}" for number in range(7)}
    ] * 2
    assert 0.6 * share <= len(validation) / 160 <= max(share, 2 * 7 / 160) + 0.01
    for part in (training, validation):
        assert all(
            utterance.reference is not None or reference is not None
            for utterance, reference in pick_references(part, seed=0)
        )


def test_the_split_is_written_beside_the_manifest(tmp_path, capsys):
    source = write_source(tmp_path / "source", "pairs")
    run(["manifest", str(source), "-o", str(tmp_path / "train.json"), "--split", "0.25"])
    paths = [tmp_path / "train.json", tmp_path / "train-val.json"]
    audio = [
        {name for sample in json.loads(path.read_text()) for _, name in contents(sample, "audio")} for path in paths
    ]
    assert [len(json.loads(path.read_text())) for path in paths] == [4, 4]
    assert audio[0].isdisjoint(audio[1])


def break_source(folder: Path, source: Path, form: str) -> str:
    """Break the second utterance; what the message must say."""
    if form == "pairs":
        (folder / "anna" / "anna_1.txt").unlink()
        return r"1 recordings have no text; .*--transcribe MODEL:\n  - anna/anna_1\.wav: no text"
    if form == "datasets":
        (source / "bad.parquet").write_bytes(b"PAR1 is no table")
        return r"bad\.parquet: cannot be read"
    if form == "webdataset":
        with tarfile.open(source / "zoe.tar", "w") as archive:
            archive.add(source / "anna.tar", "clips/zoe_1.wav")
            (folder / "list.json").write_text('{"text": ["a"]}')
            for name, file in {"zoe_2.wav": source / "anna.tar", "zoe_2.json": folder / "list.json"}.items():
                archive.add(file, f"clips/{name}")
        return (
            r"zoe\.tar::clips/zoe_1: no text; expected clips/zoe_1\.txt, or 'text' in clips/zoe_1\.json\n"
            r".*zoe\.tar::clips/zoe_2: `text` must be a string"
        )
    (folder / "wavs" / "anna_1.wav").unlink()
    places = {"table": r"list\.csv:3", "metadata": r"metadata\.json:1"}
    return places.get(form, r"train\.jsonl:2") + ": audio file not found: .*anna_1"


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_used_is_named_and_nothing_is_written(tmp_path, form):
    source = write_source(tmp_path / "source", form)
    message = break_source(tmp_path / "source", source, form)
    with pytest.raises(UserError, match=message):
        make_manifests(source, tmp_path / "out" / "train.json")
    assert not (tmp_path / "out" / "train.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "the table is empty"),
        ("a.csv", "a.wav\n", r"a\.csv:1: no text"),
        ("a.csv", b"a|\xff\n", r"a\.csv:1: not UTF-8: byte 0xff"),
        ("a.csv", "x" * 300 + "|a\n", r"a\.csv:1: audio file not found"),
        ("a.csv", "a|" + "x" * 200_000, r"a\.csv: not a table: field larger"),
        ("a.json", "{}", "expected a list of samples"),
        ("a.json", "[{}]", r"a\.json:0: expected an object with `audio_file`"),
        ("a.json", "[", r"a\.json: cannot be read"),
        ("a.jsonl", "{}\n", r"a\.jsonl: unknown form \(its first object has no keys\); expected .*audio_filepath"),
        ("a.jsonl", '{"wave": "a", "words": "b"}', "its first object has the keys 'wave', 'words'"),
        (
            "a.jsonl",
            '{"audio": "a.wav"}\n[]\n{"audio": 3}',
            r"(?s)1: audio file not.*:2: expected an obj.*:3: audio file",
        ),
        ("a.jsonl", '{"audio_filepath": ["a"]}', r"a\.jsonl:1: `audio_filepath` must be a string"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "<audio>"}]}', r"a\.jsonl:1: 1 times <audio>"),
        ("a.jsonl", "{\n", r"a\.jsonl:1: malformed JSON"),
        ("a.xyz", "", "unknown form"),
    ],
)
def test_sources_that_are_not_what_they_seem(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        make_manifests(path, tmp_path / "train.json")


def test_a_table_is_split_at_newlines_alone(tmp_path):
    text = "one\u2028two\u0085three\x0bfour"
    write_tone(tmp_path / "a.wav", 0.2)
    (tmp_path / "list.csv").write_bytes(f"a|{text}\r\na|b\n".encode())
    assert [utterance.text for utterance in read_table(tmp_path / "list.csv")] == [text, "b"]


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read the table: No such file"):
        make_manifests(tmp_path / "absent.csv", tmp_path / "train.json", form="table")


def test_flags_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        make_manifests(tmp_path / "absent", tmp_path / "train.json")
    with pytest.raises(UserError, match="no recordings found"):
        make_manifests(tmp_path, tmp_path / "train.json")
    with pytest.raises(UserError, match="expected a share between 0 and 1"):
        make_manifests(tmp_path, tmp_path / "train.json", share=1.5)
    with pytest.raises(UserError, match="needs --split"):
        make_manifests(tmp_path, tmp_path / "train.json", validation=tmp_path / "val.json")


def test_lines_may_bring_their_own_reference(tmp_path):
    for name in ("a", "b"):
        write_tone(tmp_path / "wavs" / f"{name}.wav", 0.3, pitch=200 if name == "a" else 300)
    line = {"audio": "wavs/a.wav", "text": "One.", "ref_audio": "wavs/b.wav", "ref_text": "Two."}
    (tmp_path / "list.jsonl").write_text(json.dumps(line))
    (made,) = make_manifests(tmp_path / "list.jsonl", tmp_path / "train.json")
    (sample,) = json.loads(made.path.read_text())
    assert contents(sample, "audio") == [("user", "wavs/b.wav"), ("assistant", "wavs/a.wav")]
    assert contents(sample, "text")[0] == ("user", "Two.")
    assert "speaker" not in sample


def test_nemos_parts_of_a_recording_become_files(tmp_path):
    write_tone(tmp_path / "long.wav", 3.0)
    parts = [(0.0, 1.0), (1.25, 0.5), (2.5, None)]
    lines = [
        {"audio_filepath": "long.wav", "text": f"Part {offset}.", "offset": offset, "duration": duration}
        for offset, duration in parts
    ]
    (tmp_path / "nemo.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made,) = make_manifests(tmp_path / "nemo.json", tmp_path / "train.json", speaker="one")
    long, rate = soundfile.read(tmp_path / "long.wav", dtype="float32")
    for sample, (offset, duration) in zip(json.loads(made.path.read_text()), parts, strict=True):
        (_, reference), (_, target) = contents(sample, "audio")
        assert target.startswith("train_audio/")
        assert reference != target
        cut, _ = soundfile.read(tmp_path / target, dtype="float32")
        expected = long[round(offset * rate) :][: None if duration is None else round(duration * rate)]
        assert len(cut) == len(expected)
        assert abs(cut - expected).max() < 1e-4
    lines[1]["offset"] = 9
    (tmp_path / "nemo.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"long\.wav, 9 s: `offset` 9 s is after the audio's end"):
        make_manifests(tmp_path / "nemo.json", tmp_path / "train.json", speaker="one")


def fake_ffmpeg(folder: Path, script: str) -> str:
    """A PATH on which `ffmpeg` is a script."""
    folder.mkdir()
    (folder / "ffmpeg").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "ffmpeg").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def write_m4a_pairs(folder: Path) -> Path:
    """Recordings that say they are M4A; only ffmpeg could tell that they are WAV."""
    for index in range(3):
        write_tone(folder / f"a{index}.wav", 0.4, pitch=200 + 50 * index).rename(folder / f"a{index}.m4a")
        (folder / f"a{index}.txt").write_text(f"Text {index}.")
    return folder


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg is installed")
@pytest.mark.parametrize("suffix", ["m4a", "mp4", "opus"])
def test_ffmpeg_reads_what_training_does_not(tmp_path, suffix, make_rules):
    for index in range(3):
        wav = write_tone(tmp_path / "in" / f"a{index}.wav", 1.0, pitch=200 + 50 * index, rate=48_000)
        subprocess.run(["ffmpeg", "-v", "error", "-i", wav, wav.with_suffix(f".{suffix}")], check=True)
        wav.unlink()
        (tmp_path / "in" / f"a{index}.txt").write_text(f"Text {index}.")
    (made,) = make_manifests(tmp_path / "in", tmp_path / "train.json")
    dataset = build_dataset(made.path, rules=make_rules(), cache_dir=tmp_path / "cache")
    assert len(dataset) == 3
    files = list((tmp_path / "train_audio").glob("*")) if suffix != "opus" else []
    assert len(files) == (0 if suffix == "opus" else 3)
    for file in files:
        assert abs(soundfile.info(file).duration - 1.0) < 0.1
        assert soundfile.info(file).channels == 1


def test_a_recording_that_ffmpeg_cannot_read(tmp_path, monkeypatch):
    source = write_m4a_pairs(tmp_path / "in")
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", "echo 'moov atom not found' >&2; exit 1"))
    with pytest.raises(UserError, match=r"(?s)3 recordings cannot be used:.*a0\.m4a: ffmpeg cannot read it: moov atom"):
        make_manifests(source, tmp_path / "train.json")
    assert not (tmp_path / "train.json").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"a0\.m4a and 2 more: reading \.m4a needs ffmpeg, which was not found"):
        make_manifests(source, tmp_path / "train.json")


def test_what_was_made_by_ffmpeg_is_not_made_again(tmp_path, monkeypatch):
    source = write_m4a_pairs(tmp_path / "in")
    script = f'echo x >> {tmp_path}/calls; for last; do :; done; cp "$6" "$last"'
    monkeypatch.setenv("PATH", fake_ffmpeg(tmp_path / "bin", script))
    for _ in range(2):
        make_manifests(source, tmp_path / "train.json")
    assert (tmp_path / "calls").read_text() == "x\n" * 3


def test_only_a_manifest_of_ours_is_written_over(tmp_path):
    source = write_source(tmp_path / "source", "pairs")
    config = tmp_path / "config.yaml"
    config.write_text("run: {}\n")
    with pytest.raises(UserError, match=r"--out: .*config\.yaml exists and is not a manifest that ds-higgs wrote"):
        make_manifests(source, config)
    for name in ("train.json", "train.jsonl"):
        out = tmp_path / name
        for seed in (0, 1):
            make_manifests(source, out, seed=seed, share=0.25)
        corrected = out.read_text().replace("Sentence 0", "Sentence zero")
        out.write_text(corrected)
        with pytest.raises(UserError, match="or was changed since"):
            make_manifests(source, out, share=0.25)
        assert out.read_text() == corrected
        make_manifests(source, out, share=0.25, force=True)
        make_manifests(source, out, share=0.25)
        (tmp_path / f"train-val{out.suffix}").write_text("mine")
        with pytest.raises(UserError, match=r"--val-out: .*train-val"):
            make_manifests(source, out, share=0.25)
        make_manifests(source, out)


def test_paths_are_relative_wherever_the_manifest_lies(tmp_path):
    (tmp_path / "data").mkdir()
    source = write_source(tmp_path / "data" / "raw", "table")
    (made,) = make_manifests(source, tmp_path / "made" / "here" / "train.json")
    sample = json.loads(made.path.read_text())[0]
    assert contents(sample, "audio")[1][1] == "../../data/raw/wavs/anna_0.wav"
    assert _path_from(Path("/home/me/run"), Path("/data/a.wav")) == "/data/a.wav"


def test_good_references_come_first():
    speech = [Utterance(Path(f"/{index}.wav"), str(index), f"s{index % 3}", "") for index in range(60)]
    good = {Path(f"/{index}.wav") for index in range(0, 30, 2) if index % 3 < 2}  # none of the third speaker's
    for utterance, reference in pick_references(speech, seed=0, good=good):
        assert (reference.audio in good) == (utterance.speaker != "s2")
    lone = {Path("/0.wav")}
    picked = dict(zip(range(60), (other for _, other in pick_references(speech, seed=0, good=lone)), strict=True))
    assert picked[3].audio == Path("/0.wav")
    assert picked[0].audio != Path("/0.wav")


def test_references_are_three_to_ten_seconds_and_clean(tmp_path):
    """Of a short, a long, a clipped, a noisy and two good recordings."""
    rng = np.random.default_rng(0)
    for name, seconds in {"short": 1, "long": 12, "clipped": 5, "noisy": 5, "good": 4, "fine": 9}.items():
        samples = tone(seconds, pitch=150 + 10 * len(name), seed=seconds)
        samples[: len(samples) // 4] *= 0.001
        if name == "clipped":
            samples = np.clip(samples, -0.2, 0.2)
        if name == "noisy":
            samples = samples + rng.normal(scale=0.1, size=len(samples)).astype(np.float32)
        soundfile.write(tmp_path / f"{name}.wav", samples, 24_000)
        (tmp_path / f"{name}.txt").write_text(f"Text of {name}.")
    (made,) = make_manifests(tmp_path, tmp_path / "train.json")
    pairs = {contents(one, "audio")[1][1]: contents(one, "audio")[0][1] for one in json.loads(made.path.read_text())}
    assert pairs["good.wav"] == "fine.wav"
    assert pairs["fine.wav"] == "good.wav"
    assert set(pairs.values()) == {"good.wav", "fine.wav"}
