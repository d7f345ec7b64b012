"""Generated broken manifests and audio: `validate`, `prepare` and `train` name every bad sample and write nothing.

DS_HIGGS_BROKEN_CASES sets the number of cases of each test; 500 is the long form.
"""

import base64
import copy
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ds_higgs.cli.main import run
from ds_higgs.errors import UserError
from tests.support import launching

CASES = int(os.environ.get("DS_HIGGS_BROKEN_CASES", "25"))
RATE = 24000
BAD_AUDIO = (
    "absent", "empty", "folder", "text", "header", "wav_cut", "flac_cut", "short", "long", "silent", "nan", "channels"
)  # fmt: skip
JUNK = (None, True, -1, 3.5, 10**30, "", "junk", "\u0000", [], {}, [[]], {"type": "audio"}, {"role": "user"}, ["x"])


def tone(seconds, pitch):
    time = np.arange(int(seconds * RATE)) / RATE
    return 0.3 * np.sin(2 * np.pi * pitch * time) + 0.1 * np.sin(5 * np.pi * pitch * time)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """good0.wav ... good5.flac, and one file of each kind of bad audio."""
    folder = tmp_path_factory.mktemp("audio")
    for number in range(6):
        suffix = "wav" if number % 2 else "flac"
        soundfile.write(folder / f"good{number}.{suffix}", tone(0.3 + 0.1 * number, 200 + 40 * number), RATE)
    (folder / "empty.wav").touch()
    (folder / "folder.wav").mkdir()
    (folder / "text.wav").write_text("no audio at all")
    wav, flac = (folder / "good5.wav").read_bytes(), (folder / "good4.flac").read_bytes()
    (folder / "header.wav").write_bytes(wav[:44])
    (folder / "wav_cut.wav").write_bytes(wav[: len(wav) // 2])
    (folder / "flac_cut.wav").write_bytes(flac[: len(flac) // 2])
    soundfile.write(folder / "short.wav", tone(0.05, 200), RATE)
    soundfile.write(folder / "long.wav", tone(31, 200), RATE)
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "nan.wav", np.where(np.arange(RATE) == 7, np.nan, tone(1, 200)), RATE, subtype="FLOAT")
    soundfile.write(folder / "channels.wav", np.stack([tone(1, 200)] * 4, axis=1), RATE)
    return folder


def good_sample(chance: random.Random, audio: Path):
    def item():
        number = chance.randrange(6)
        path = audio / f"good{number}.{'wav' if number % 2 else 'flac'}"
        form = chance.randrange(4)
        if form == 0:
            return {"type": "audio", "raw_audio": base64.b64encode(path.read_bytes()).decode()}
        if form == 1:
            return {"type": "audio", "audio_url": str(path), "offset": 0.05, "duration": 0.2}
        return {"type": "audio", "audio_url": path.name}

    user = [{"type": "text", "text": "What it says."}, item(), {"type": "text", "text": "Please say: سلام"}]
    target = [{"type": "text", "text": "سلام"}, item()]
    messages = [{"role": "system", "content": "Speak."}, {"role": "user", "content": user},
                {"role": "assistant", "content": target}]  # fmt: skip
    return {"messages": messages, "speaker": "one"}


def break_role(sample, chance):
    sample["messages"][chance.randrange(3)]["role"] = chance.choice(["tool", "", None, 3, ["user"]])


def break_messages(sample, chance):
    sample["messages"] = chance.choice([None, [], "x", {}, 3, [None], [[]], ["x"]])


def drop_target(sample, chance):
    sample["messages"][2]["content"] = chance.choice([[], "", "text alone", None, 3])


def break_start_index(sample, chance):
    sample["start_index"] = chance.choice([3, -1, "2", 10**30, True, 0.5, [1]])


def break_item(sample, chance):
    message = sample["messages"][chance.choice([1, 2])]
    message["content"].append(chance.choice([None, 3, [], {}, {"type": "video"}, {"type": "text"}, {"type": "audio"}]))


def break_text(sample, chance):
    sample["messages"][chance.choice([1, 2])]["content"][0]["text"] = chance.choice(
        [None, 3, [], "\ud83d", "say <|AUDIO|>", "<|AUDIO_OUT|>"]
    )


def break_segment(sample, chance):
    item = sample["messages"][2]["content"][1]
    key, value = chance.choice([("offset", -0.1), ("offset", 99), ("offset", "0"), ("duration", 0), ("duration", 99)])
    item[key] = value


def break_raw_audio(sample, chance):
    raw = chance.choice(["%%%", "", "abc", base64.b64encode(b"no audio").decode(), 3])
    sample["messages"][2]["content"][1] = {"type": "audio", "raw_audio": raw}


def use_bad_audio(sample, chance):
    kind = chance.choice(BAD_AUDIO)
    sample["messages"][chance.choice([1, 2])]["content"][1] = {"type": "audio", "audio_url": f"{kind}.wav"}


def use_strange_path(sample, chance):
    url = chance.choice(["https://host/a.wav", "a\u0000b.wav", "x" * 5000, ".", "../", 3, "", "~", "good0.flac/x"])
    sample["messages"][1]["content"][1] = {"type": "audio", "audio_url": url}


BREAKERS = (
    break_role, break_messages, drop_target, break_start_index, break_item, break_text, break_segment,
    break_raw_audio, use_bad_audio, use_bad_audio, use_strange_path,
)  # fmt: skip


def write_lines(path: Path, samples, chance, *, as_lines: bool):
    """The manifest, and the numbers by which messages name its samples."""
    if not as_lines:
        path.write_text(json.dumps(samples, indent=chance.choice([None, 1])), encoding="utf-8")
        return list(range(len(samples)))
    lines = []
    numbers = []
    for sample in samples:
        if chance.random() < 0.2:
            lines.append("")
        lines.append(json.dumps(sample))
        numbers.append(len(lines))
    path.write_text("\n".join(lines), encoding="utf-8")
    return numbers


def make_case(seed: int, folder: Path, audio: Path):
    """A manifest with at least one bad and one good sample: its path, and the numbers of the bad ones."""
    chance = random.Random(seed)
    samples = [good_sample(chance, audio) for _ in range(chance.randint(2, 5))]
    bad = set(chance.sample(range(len(samples)), chance.randint(1, len(samples) - 1)))
    for index in bad:
        chance.choice(BREAKERS)(samples[index], chance)
    as_lines = chance.random() < 0.5
    path = folder / ("train.jsonl" if as_lines else "train.json")
    numbers = write_lines(path, samples, chance, as_lines=as_lines)
    return path, {numbers[index] for index in bad}, len(samples)


@pytest.fixture
def flags(tiny_base, audio, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "shared_broken_cache"
    return [f"--base_ckpt={tiny_base}", f"--data.cache_dir={cache}", f"--data.audio_root={audio}"]


@pytest.mark.parametrize("seed", range(CASES))
def test_every_bad_sample_is_named_and_no_good_one(seed, tmp_path, audio, flags, capsys):
    manifest, bad, count = make_case(seed, tmp_path, audio)
    arguments = [*flags, f"--train_manifest={manifest}", f"--output_dir={tmp_path / 'run'}"]

    with pytest.raises(UserError, match="would stop training"):
        run(["validate", *arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert {problem["number"] for problem in report["problems"]} == bad
    assert all(problem["sample"] == f"{manifest.name}:{problem['number']}" for problem in report["problems"])
    assert report["manifests"][str(manifest)]["num_samples"] == count - len(bad)

    with pytest.raises(UserError) as caught:
        run(["prepare", *arguments])
    named = re.findall(rf"^  - {manifest.name}:(\d+): ", str(caught.value), flags=re.MULTILINE)
    assert {int(number) for number in named} == bad
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", range(1000, 1000 + max(2, CASES // 5)))
def test_train_stops_before_it_writes_anything(seed, tmp_path, audio, flags):
    manifest, bad, _ = make_case(seed, tmp_path, audio)
    done = launching.run_ds_higgs("train", *flags, f"--train_manifest={manifest}", f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stdout
    named = re.findall(rf"^  - {manifest.name}:(\d+): ", done.stdout, flags=re.MULTILINE)
    assert {int(number) for number in named} == bad
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", range(2000, 2000 + max(1, CASES // 25)))
def test_train_on_the_rest_and_list_the_rejected(seed, tmp_path, audio, flags):
    manifest, bad, count = make_case(seed, tmp_path, audio)
    arguments = [f"--train_manifest={manifest}", f"--output_dir={tmp_path / 'run'}", "--data.on_bad_sample=skip"]
    quiet = ["--batch_size=1", "--data.num_workers=0", "--logging.progress=false"]
    done = launching.run_ds_higgs("train", *flags, *arguments, *quiet)
    assert done.returncode == 0, done.stdout
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert {line["number"] for line in rejected} == bad
    assert len(rejected) == len(bad)
    assert all(line["reasons"] for line in rejected)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["num_samples"] for line in metrics if line["event"] == "step") == count - len(bad)


def replace_somewhere(value, chance):
    """A copy with one node, chosen at random, replaced by junk or removed."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        if chance.random() < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: replace_somewhere(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        index = chance.randrange(len(value))
        return [*value[:index], replace_somewhere(value[index], chance), *value[index + 1 :]]
    return copy.deepcopy(chance.choice(JUNK))


@pytest.mark.parametrize("seed", range(3000, 3000 + CASES))
def test_junk_anywhere_is_a_problem_or_harmless_but_never_a_crash(seed, tmp_path, audio, flags, capsys):
    chance = random.Random(seed)
    samples = [good_sample(chance, audio) for _ in range(2)]
    samples[0] = replace_somewhere(samples[0], chance)
    manifest = tmp_path / "train.json"
    write_lines(manifest, samples, chance, as_lines=False)
    arguments = [*flags, f"--train_manifest={manifest}", f"--output_dir={tmp_path / 'run'}", "--json"]
    run(["validate", *arguments, "--data.on_bad_sample=skip"])
    report = json.loads(capsys.readouterr().out)
    bad = {problem["number"] for problem in report["rejected"]}
    assert bad <= {0}
    assert report["manifests"][str(manifest)]["num_samples"] == 2 - len(bad)


@pytest.mark.parametrize("seed", range(4000, 4000 + CASES))
def test_damaged_files_are_an_error_with_their_place(seed, tmp_path, audio, flags, capsys):
    """Bytes cut off, flipped or inserted anywhere: still a manifest, or one message that names file and place."""
    chance = random.Random(seed)
    manifest, _, _ = make_case(seed, tmp_path, audio)
    content = bytearray(manifest.read_bytes())
    place = chance.randrange(len(content))
    damage = chance.choice(["cut", "flip", "insert"])
    if damage == "cut":
        del content[place:]
    elif damage == "flip":
        content[place] ^= 1 << chance.randrange(8)
    else:
        content[place:place] = bytes(chance.randrange(256) for _ in range(3))
    manifest.write_bytes(content)
    try:
        run(["validate", *flags, f"--train_manifest={manifest}", f"--output_dir={tmp_path / 'run'}", "--json"])
    except UserError:
        report = json.loads(capsys.readouterr().out)
        for problem in report["problems"]:
            assert problem["number"] is not None or manifest.name in problem["message"]
    assert not (tmp_path / "run").exists()
