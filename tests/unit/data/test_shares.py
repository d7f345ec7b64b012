"""Shares of a manifest, each made by a process of its own, join to what one process makes."""

import base64
import json
import multiprocessing
import shutil
import signal
from collections import Counter

import pytest
import torch

from ds_higgs.cli.main import run
from ds_higgs.data import encoding
from ds_higgs.data.arrow_files import read_table
from ds_higgs.data.build import build_dataset
from ds_higgs.data.cache import CodeCache
from ds_higgs.data.exclusion import Exclusion
from ds_higgs.data.shares.dealing import Dealer, Share
from ds_higgs.data.shares.joining import ShareJoin
from ds_higgs.data.shares.making import ShareMaker
from ds_higgs.errors import UserError
from tests.support.patience import HANG_S

from .audio_files import cloning_sample, write_chain, write_lines, write_tone

CLIPS = 24


@pytest.fixture
def manifest(tmp_path):
    folder = tmp_path / "data"
    samples = write_chain(folder, CLIPS, longer_by=0.01)
    shutil.copy(folder / "3.wav", folder / "copy of 3.wav")
    return write_lines(folder / "train.jsonl", [*samples, cloning_sample("copy of 3.wav", "4.wav")])


def codes_in(cache_dir):
    """By key, all clips of a cache, byte for byte; none is there twice."""
    rows = [row for file in cache_dir.glob("codes/*/clips-*.arrow") for row in read_table(file).to_pylist()]
    found = {row["key"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def samples_in(cache_dir):
    return {path.name: path.read_bytes() for path in cache_dir.glob("prepared/*/samples/*.arrow")}


def make_by_command(arguments, reached=None):
    """Run `ds-higgs prepare`; where `reached` is given, go no further than the second unit, and tell."""
    torch.set_num_threads(1)
    encoding.UNIT_CLIPS = 2
    add = CodeCache.add

    def add_and_stay(self, clips, *, unit=None):
        add(self, clips, unit=unit)
        if len(list((self.folder / "units").iterdir())) == 2:
            reached.set()
            signal.pause()

    if reached is not None:
        CodeCache.add = add_and_stay
    run(arguments)


@pytest.mark.costly
def test_four_shares_in_four_folders_one_killed_join_to_what_one_process_makes(manifest, tiny_base, tmp_path, capsys):
    keys = ["prepare", f"--base_ckpt={tiny_base}", "--run.output_dir=run"]
    here = [*keys, f"--train_manifest={manifest}"]
    context = multiprocessing.get_context("fork")
    folders = [tmp_path / f"machine{number}" for number in range(4)]
    shares = [[*here, f"--share={n}/4", f"--data.cache_dir={folder}"] for n, folder in enumerate(folders, start=1)]
    reached = context.Event()
    processes = [context.Process(target=make_by_command, args=(words,)) for words in shares[:2] + shares[3:]]
    killed = context.Process(target=make_by_command, args=(shares[2], reached))
    for process in (*processes, killed):
        process.start()
    assert reached.wait(HANG_S)
    killed.kill()
    for process in (*processes, killed):
        process.join()
    assert [process.exitcode for process in (*processes, killed)] == [0, 0, 0, -signal.SIGKILL]
    assert not list(tmp_path.glob("machine*/**/*.lock"))

    elsewhere = tmp_path / "elsewhere"  # without any audio
    elsewhere.mkdir()
    shutil.copy(manifest, elsewhere)
    joined = tmp_path / "joined"
    join = [*keys, f"--train_manifest={elsewhere / manifest.name}", f"--data.cache_dir={joined}", "--join"]
    with pytest.raises(UserError, match=r"share 3/4: .*unfinished, 4 of \d clips are encoded; .*--share 3/4"):
        run([*join, *map(str, folders)])

    capsys.readouterr()
    run(shares[2])
    assert ", 4 before" in capsys.readouterr().out
    run([*join, *map(str, folders)])
    assert f"{CLIPS + 1} samples, {CLIPS} clips of 4 shares" in capsys.readouterr().out
    run([*here, f"--data.cache_dir={tmp_path / 'alone'}"])
    assert codes_in(joined) == codes_in(tmp_path / "alone")
    assert samples_in(joined) == samples_in(tmp_path / "alone")


def make(manifest, rules, cache_dir, count, *, only=None, **options):
    for number in only or range(1, count + 1):
        maker = ShareMaker(manifest, Share(number, count), rules=rules, cache_dir=cache_dir)
        maker.run(devices=["cpu"], **options)
    return maker


def join(manifest, rules, cache_dir):
    shares = ShareJoin(manifest, rules=rules, roots=[cache_dir])
    shares.take_in(cache_dir)
    return shares


@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_every_audio_item_is_of_one_share(manifest, count):
    dealer = Dealer(manifest, count, Exclusion(manifest, ()))
    dealt = [item.path for number in range(1, count + 1) for item in dealer.own_items(Share(number, count))]
    assert Counter(dealt) == dict.fromkeys([f"{index}.wav" for index in range(CLIPS)] + ["copy of 3.wav"], 1)
    assert dealer.problems == []


def test_what_holds_many_recordings_is_dealt_whole_and_in_turn(tmp_path):
    samples = [
        cloning_sample(f"{shard}.tar::{clip}.wav", f"{(shard + 1) % 6}.tar::{clip}.wav")
        for shard in range(6)
        for clip in range(5)
    ]
    manifest = write_lines(tmp_path / "train.jsonl", samples)
    dealer = Dealer(manifest, 3, Exclusion(manifest, ()))
    shards = [{item.path.partition("::")[0] for item in dealer.own_items(Share(number, 3))} for number in (1, 2, 3)]
    assert shards == [{"0.tar", "3.tar"}, {"1.tar", "4.tar"}, {"2.tar", "5.tar"}]


def test_missing_shares_are_named_with_their_clips(manifest, make_rules, tmp_path):
    rules = make_rules()
    with pytest.raises(UserError, match=r"no shares of .*train\.jsonl in .*cache"):
        join(manifest, rules, tmp_path / "cache")
    make(manifest, rules, tmp_path / "cache", 3, only=[2])
    dealer = Dealer(manifest, 3, Exclusion(manifest, ()))
    sizes = [len(dealer.own_items(Share(number, 3))) for number in (1, 3)]
    with pytest.raises(
        UserError,
        match=rf"(?s)share 1/3: not there: {sizes[0]} clips; .*--share 1/3.*share 3/3: not there: {sizes[1]} clips",
    ):
        join(manifest, rules, tmp_path / "cache")


def test_a_damaged_share_is_named_and_made_again(manifest, make_rules, tmp_path):
    rules, cache_dir = make_rules(), tmp_path / "cache"
    folder = make(manifest, rules, cache_dir, 2).folder
    [codes] = folder.glob("codes/*/clips-*.arrow")
    content = bytearray(codes.read_bytes())
    clip = next(iter(codes_in(folder).values()))
    content[content.index(torch.tensor(clip["codes"], dtype=torch.int16).numpy().tobytes())] ^= 1
    codes.write_bytes(content)
    with pytest.raises(UserError, match=r"share 2/2: .*: 1 of \d+ clips are damaged; .*--share 2/2"):
        join(manifest, rules, cache_dir)
    found = next(folder.glob("found-*.arrow"))
    found.write_bytes(found.read_bytes().replace(b".wav", b".mp3", 1))
    with pytest.raises(UserError, match=r"share 2/2: .*found-00000\.arrow: fails its checksum"):
        join(manifest, rules, cache_dir)
    assert make(manifest, rules, cache_dir, 2, only=[2]).num_missing == 1
    join(manifest, rules, cache_dir)
    build_dataset(manifest, rules=rules, cache_dir=tmp_path / "alone")
    assert codes_in(cache_dir) == codes_in(tmp_path / "alone")


def test_audio_that_cannot_be_used_is_told_by_its_share_and_by_the_join(manifest, make_rules, tmp_path):
    (manifest.parent / "5.wav").unlink()
    write_tone(manifest.parent / "7.wav", 0.3)
    silent = bytearray((manifest.parent / "7.wav").read_bytes())
    silent[44:] = bytes(len(silent) - 44)
    (manifest.parent / "7.wav").write_bytes(silent)
    rules, cache_dir = make_rules(), tmp_path / "cache"
    with pytest.raises(UserError, match=r"(?s)audio .*5\.wav: file not found.*audio .*7\.wav: the audio is silent"):
        make(manifest, rules, cache_dir, 1)
    assert [path for path in cache_dir.rglob("*.arrow") if "codes" in path.parts] == []
    make(manifest, rules, cache_dir, 2, skip_bad=True)
    known = join(manifest, rules, cache_dir).known_files()
    alone = build_dataset(manifest, rules=rules, cache_dir=tmp_path / "alone", on_bad_sample="skip")
    audio = [path.rename(path.with_suffix(".away")) for path in manifest.parent.glob("*.wav")]
    joined = build_dataset(manifest, rules=rules, cache_dir=cache_dir, on_bad_sample="skip", known=known)
    assert len(audio) == CLIPS
    assert joined.rejected == alone.rejected
    assert len(joined.rejected) == 4
    assert samples_in(cache_dir) == samples_in(tmp_path / "alone")
    assert codes_in(cache_dir) == codes_in(tmp_path / "alone")


def test_a_share_takes_what_the_cache_has(manifest, make_rules, tmp_path):
    rules, cache_dir = make_rules(), tmp_path / "cache"
    build_dataset(manifest, rules=rules, cache_dir=cache_dir)
    maker = make(manifest, rules, cache_dir, 1)
    assert (maker.num_clips, maker.num_missing) == (CLIPS, 0)
    assert codes_in(maker.folder) == codes_in(cache_dir)


def test_audio_in_the_manifest_itself_is_encoded_by_one_share(manifest, make_rules, tmp_path):
    samples = [json.loads(line) for line in manifest.read_text().splitlines()[:6]]
    for sample in samples:
        for message in sample["messages"][1:]:
            for item in message["content"]:
                if item["type"] == "audio":
                    content = (manifest.parent / item.pop("audio_url")).read_bytes()
                    item["raw_audio"] = base64.b64encode(content).decode()
    manifest.write_text(json.dumps(samples))
    rules, cache_dir = make_rules(), tmp_path / "cache"
    make(manifest, rules, cache_dir, 3)
    parts = [set(codes_in(folder)) for folder in cache_dir.glob("shares/*/*")]
    assert [sum(key in part for part in parts) for key in set().union(*parts)] == [1] * 7
    join(manifest, rules, cache_dir)
    build_dataset(manifest, rules=rules, cache_dir=tmp_path / "alone")
    assert codes_in(cache_dir) == codes_in(tmp_path / "alone")


@pytest.mark.slow
def test_processes_of_one_share_divide_it_without_locks(manifest, make_rules, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "UNIT_CLIPS", 2)
    rules, cache_dir = make_rules(), tmp_path / "cache"
    told = []
    maker = make(manifest, rules, cache_dir, 1, num_processes=3, progress=lambda *numbers: told.append(numbers))
    assert told[-1][0] == told[-1][1] < CLIPS, "the others have encoded nothing"
    assert not list(cache_dir.rglob("*.lock"))
    build_dataset(manifest, rules=rules, cache_dir=tmp_path / "alone")
    assert codes_in(maker.folder) == codes_in(tmp_path / "alone")
