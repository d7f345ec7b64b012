"""What is prepared is opened as it is; what has changed, and what is damaged, is made again, and nothing else."""

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_higgs.data import analysis, reuse
from ds_higgs.data.arrow_files import read_table
from ds_higgs.data.build import Preparation, build_dataset
from ds_higgs.data.ranks import RankChannel
from ds_higgs.errors import UserError
from tests.support.rank_threads import RankThreads

from .audio_files import cloning_sample, write_tone

NUM_SAMPLES = 6


@pytest.fixture
def analysed(monkeypatch):
    """Numbers of the entries that are analysed, since the list was cleared."""
    numbers = []
    analyse_entry = analysis.analyse_entry
    monkeypatch.setattr(analysis, "BLOCK", 4)

    def spy(raw, rules, finder):
        numbers.append(raw.number)
        return analyse_entry(raw, rules, finder)

    monkeypatch.setattr(analysis, "analyse_entry", spy)
    return numbers


def write_samples(folder: Path) -> Path:
    for number in range(NUM_SAMPLES + 1):
        write_tone(folder / f"{number}.wav", 0.2 + 0.05 * number, pitch=150 + 20 * number, seed=number)
    samples = [cloning_sample(f"{number}.wav", f"{number + 1}.wav", f"text {number}") for number in range(NUM_SAMPLES)]
    manifest = folder / "train.json"
    manifest.write_text(json.dumps(samples))
    return manifest


@pytest.fixture
def manifest(tmp_path):
    return write_samples(tmp_path / "data")


def contents(dataset):
    samples = [dataset[index] for index in range(len(dataset))]
    return {
        dataset.sample_id(index): (
            sample.input_ids.tolist(),
            sample.label_ids.tolist(),
            sample.audio_ids_concat.tolist(),
        )
        for index, sample in enumerate(samples)
    }


def build(manifest, rules, **options):
    return build_dataset(manifest, rules=rules, cache_dir=manifest.parent.parent / "cache", **options)


def the_set(manifest) -> Path:
    [folder] = (manifest.parent.parent / "cache" / "prepared").glob("[!.]*")
    return folder


@pytest.mark.parametrize("prompt_form", ["as_is", "mixed"])
def test_what_is_prepared_is_opened_without_analysis(manifest, make_rules, analysed, prompt_form):
    first = build(manifest, make_rules(prompt_form=prompt_form))
    assert analysed == list(range(NUM_SAMPLES))
    analysed.clear()
    again = build(manifest, make_rules(prompt_form=prompt_form))
    assert analysed == []
    assert contents(again) == contents(first)
    assert contents(again.in_epoch(0, seed=0)) == contents(first.in_epoch(0, seed=0))
    assert again.lengths.tolist() == first.lengths.tolist()
    assert again.filler_index == first.filler_index


@pytest.mark.parametrize("change", [{"prompt_form": "boson"}, {"max_audio_s": 9.0}, {"use_delay_pattern": False}])
def test_other_rules_are_another_set(manifest, make_rules, analysed, change):
    build(manifest, make_rules())
    analysed.clear()
    build(manifest, make_rules(**change))
    assert analysed == list(range(NUM_SAMPLES))


def test_of_a_changed_manifest_only_what_changed_is_analysed(manifest, make_rules, analysed, tmp_path):
    build(manifest, make_rules())
    samples = json.loads(manifest.read_text())
    new = cloning_sample("0.wav", "3.wav", "a new one")
    manifest.write_text(json.dumps([samples[4], samples[5], new, *samples[:3], samples[0]], indent=1))
    analysed.clear()
    found = build(manifest, make_rules())
    # Other white space is another text: the manifest is compared as it is written.
    assert analysed == list(range(7))
    manifest.write_text(json.dumps([*samples, new]))
    analysed.clear()
    build(manifest, make_rules())
    manifest.write_text(json.dumps([samples[4], samples[5], new, *samples[:3], samples[0]]))
    analysed.clear()
    found = build(manifest, make_rules())
    assert analysed == []
    shutil.rmtree(tmp_path / "cache")
    assert contents(found) == contents(build(manifest, make_rules()))


def test_a_changed_audio_file_has_its_samples_analysed_again(manifest, make_rules, analysed):
    before = contents(build(manifest, make_rules()))
    write_tone(manifest.parent / "2.wav", 0.5, pitch=700)
    (manifest.parent / "5.wav").touch()  # another time, the same content
    analysed.clear()
    after = contents(build(manifest, make_rules()))
    assert analysed == [1, 2]
    assert [name for name in before if before[name] != after[name]] == ["train.json:1", "train.json:2"]


def test_codes_travel_without_their_audio(manifest, make_rules, analysed, tmp_path, caplog):
    before = contents(build(manifest, make_rules()))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "cache", elsewhere / "cache")
    (elsewhere / "data").mkdir()
    shutil.copy(manifest, elsewhere / "data")
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(manifest.parent)
    analysed.clear()
    with caplog.at_level("INFO", "ds_higgs"):
        assert contents(build(elsewhere / "data" / manifest.name, make_rules())) == before
    assert analysed == []
    assert f"train.json: {NUM_SAMPLES + 1} audio files are not here; their codes are used" in caplog.text


def test_audio_that_only_another_manifest_names_is_not_said_to_be_missing(manifest, make_rules, tmp_path, caplog):
    build(manifest, make_rules())
    other = tmp_path / "other" / "train.json"
    for name in "ab":
        write_tone(other.parent / f"{name}.wav", 0.3)
    other.write_text(json.dumps([cloning_sample("a.wav", "b.wav", "another")]))
    with caplog.at_level("INFO", "ds_higgs"):
        build(other, make_rules())
    assert "are not here" not in caplog.text


def test_of_audio_that_is_elsewhere_all_is_known_under_other_rules_too(manifest, make_rules, tmp_path, monkeypatch):
    forms = [make_rules(prompt_form=form) for form in ("as_is", "mixed")]
    elsewhere = [replace(rules, audio_here=False) for rules in forms]
    before = contents(build(manifest, forms[0]))
    for path in manifest.parent.glob("*.wav"):
        path.unlink()
    monkeypatch.setattr(reuse, "look_at_files", None)  # it would be called otherwise
    assert contents(build(manifest, elsewhere[0])) == before
    assert contents(build(manifest, elsewhere[1])) == before
    samples = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([*samples, cloning_sample("new.wav", "0.wav")]))
    with pytest.raises(UserError, match=r"new\.wav: nothing of it is prepared \(.*data\.audio is elsewhere"):
        build(manifest, elsewhere[0])
    manifest.write_text(json.dumps(samples))
    shutil.rmtree(tmp_path / "cache" / "codes")
    with pytest.raises(UserError, match=r"data\.audio: elsewhere, but the codes of 7 of 7 clips are not in .*cache"):
        build(manifest, elsewhere[1])
    with pytest.raises(UserError, match=r"0\.wav: its codes are not in the code cache \(.*data\.audio is elsewhere"):
        build(manifest, replace(elsewhere[1], max_tokens=9999))


def test_the_same_manifest_beside_other_audio_is_another_data_set(manifest, make_rules, tmp_path):
    before = contents(build(manifest, make_rules()))
    other = shutil.copytree(manifest.parent, tmp_path / "other") / manifest.name
    write_tone(other.parent / "2.wav", 0.5, pitch=700)
    found = contents(build(other, make_rules()))
    assert [name for name in before if before[name] != found[name]] == ["train.json:1", "train.json:2"]
    assert contents(build(manifest, make_rules())) == before


def test_what_is_right_of_a_refused_manifest_is_not_analysed_again(manifest, make_rules, analysed):
    samples = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([*samples, cloning_sample("absent.wav", "0.wav")]))
    with pytest.raises(UserError, match=r"absent\.wav: file not found"):
        build(manifest, make_rules())
    manifest.write_text(json.dumps([*samples, cloning_sample("0.wav", "0.wav")]))
    analysed.clear()
    assert len(build(manifest, make_rules())) == NUM_SAMPLES + 1
    assert analysed == [NUM_SAMPLES]


def test_a_sample_with_a_problem_is_looked_at_again(manifest, make_rules, analysed):
    (manifest.parent / "3.wav").rename(manifest.parent / "there.wav")
    for _ in range(2):
        found = build(manifest, make_rules(), on_bad_sample="skip")
        assert [problem.number for problem in found.rejected] == [2, 3]
        assert len(found) == NUM_SAMPLES - 2
    folder = the_set(manifest)
    assert analysed == [*range(NUM_SAMPLES), 2, 3]
    (manifest.parent / "there.wav").rename(manifest.parent / "3.wav")
    assert len(build(manifest, make_rules())) == NUM_SAMPLES
    assert folder.exists()


def test_raw_audio_is_found_where_it_stands_now(manifest, make_rules):
    samples = json.loads(manifest.read_text())
    raw = {"type": "audio", "raw_audio": base64.b64encode((manifest.parent / "2.wav").read_bytes()).decode()}
    samples[1]["messages"][2]["content"] = [raw]
    manifest.write_text(json.dumps(samples))
    build(manifest, make_rules())
    manifest.write_text(json.dumps([samples[5], samples[4], *samples[:4]]))
    preparation = Preparation(manifest, rules=make_rules(), cache_dir=manifest.parent.parent / "cache")
    preparation.run(on_bad_sample="error", devices=["cpu"])
    clip = preparation.samples.clips(3)[1]
    assert clip.source(manifest) == (manifest.parent / "2.wav").read_bytes()


def flip_a_byte_of(path: Path, content: bytes) -> None:
    found = bytearray(path.read_bytes())
    place = found.find(content)
    assert place >= 0
    found[place] ^= 1
    path.write_bytes(found)


def test_a_damaged_sample_is_found_when_it_is_read_and_it_alone_is_made_again(manifest, make_rules, analysed):
    dataset = build(manifest, make_rules())
    before = contents(dataset)
    tokens = dataset[3].input_ids.numpy().astype(np.int32).tobytes()
    flip_a_byte_of(next((the_set(manifest) / "samples").glob("*.arrow")), tokens)
    damaged = build(manifest, make_rules())
    assert torch.equal(damaged[2].input_ids, dataset[2].input_ids)
    with pytest.raises(UserError, match="sample 3 is damaged; start again"):
        damaged[3]
    analysed.clear()
    assert contents(build(manifest, make_rules())) == before
    assert analysed == [3]


@pytest.mark.parametrize(
    ("name", "damage"),
    [("prepared.json", "cut"), ("places.arrow", "gone"), ("files.arrow", "cut"), ("samples/data-00000.arrow", "cut")],
)
def test_a_set_that_is_not_whole_is_made_again(manifest, make_rules, name, damage):
    before = contents(build(manifest, make_rules()))
    path = the_set(manifest) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-9])
    assert contents(build(manifest, make_rules())) == before


@pytest.mark.parametrize("column", ["length", "row"])
def test_a_damaged_column_that_is_read_as_a_whole_is_found_at_the_start(manifest, make_rules, column, caplog):
    dataset = build(manifest, make_rules())
    lengths, rows = dataset.lengths.tolist(), dataset._prepared.places.row.tobytes()
    if column == "length":
        flip_a_byte_of(the_set(manifest) / "samples" / "data-00000.arrow", dataset.lengths.tobytes())
    else:
        flip_a_byte_of(the_set(manifest) / "places.arrow", rows)
    assert build(manifest, make_rules()).lengths.tolist() == lengths
    assert f"the column {column!r} fails its checksum" in caplog.text


def test_a_deep_check_names_what_is_damaged_and_the_next_start_mends_it(manifest, make_rules, analysed):
    dataset = build(manifest, make_rules())
    before = contents(dataset)
    cache = manifest.parent.parent / "cache"
    [codes] = cache.glob("codes/*/clips-*.arrow")
    tokens, clip = dataset[3].input_ids.numpy(), dataset[2].get_audio_codes(1).numpy()
    flip_a_byte_of(codes, clip.astype(np.int16).tobytes())
    flip_a_byte_of(next((the_set(manifest) / "samples").glob("*.arrow")), tokens.astype(np.int32).tobytes())
    preparation = Preparation(manifest, rules=make_rules(), cache_dir=cache)
    preparation.analyse()
    assert [(path.name, what) for path, what in preparation.find_damage()] == [
        ("samples", f"1 of {NUM_SAMPLES} samples fail their checksum"),
        (codes.name, f"1 of {NUM_SAMPLES + 1} clips fail their checksum"),
    ]
    analysed.clear()
    mended = Preparation(manifest, rules=make_rules(), cache_dir=cache)
    mended.run(on_bad_sample="error", devices=["cpu"])
    assert contents(mended.dataset()) == before
    assert (analysed, mended.num_missing) == ([3], 1)


def build_on_two_machines(manifest, rules, caches):
    """What each of two ranks gets that has a cache of its own."""
    threads = RankThreads(2)

    def build_on(rank):
        ranks = RankChannel(rank, 2, threads.gather_of(rank))
        try:
            return contents(build_dataset(manifest, rules=rules, cache_dir=caches[rank], ranks=ranks))
        except UserError as error:
            return str(error)

    return threads.run(build_on)


def test_machines_with_caches_of_their_own_train_on_what_each_has_prepared(manifest, make_rules, analysed, tmp_path):
    caches = [tmp_path / "machine0", tmp_path / "machine1"]
    before = [contents(build_dataset(manifest, rules=make_rules(), cache_dir=cache)) for cache in caches]
    analysed.clear()
    # As if neither saw the other's disk: the folders' names differ.
    assert build_on_two_machines(manifest, make_rules(), caches) == before
    assert analysed == []


def test_codes_that_have_gone_meanwhile_are_no_others(manifest, make_rules):
    cache = manifest.parent.parent / "cache"
    preparation = Preparation(manifest, rules=make_rules(), cache_dir=cache)
    preparation.run(on_bad_sample="error", devices=["cpu"])
    shutil.rmtree(next(cache.glob("codes/*/units")))
    with pytest.raises(UserError, match="codes have gone"):
        preparation.dataset()


def test_the_tables_say_what_they_hold(manifest, make_rules):
    """As `datasets.load_from_disk` reads them: the files of state.json, one after another."""
    dataset = build(manifest, make_rules())
    codes = next((manifest.parent.parent / "cache").glob("codes/*"))
    rows = {}
    for folder in (the_set(manifest) / "samples", codes):
        state = json.loads((folder / "state.json").read_text())
        files = [folder / file["filename"] for file in state["_data_files"]]
        rows[folder.name] = [row for file in files for row in read_table(file).to_pylist()]
    assert [row["tokens"] for row in rows["samples"]] == [
        dataset[index].input_ids.tolist() for index in range(len(dataset))
    ]
    assert {row["source"] for row in rows["samples"]} == {"train.json"}
    clips = {row["key"]: row for row in rows[codes.name]}
    for index, row in enumerate(rows["samples"]):
        found = [np.asarray(clips[clip["key"]]["codes"]).reshape(8, -1) for clip in row["clips"]]
        assert np.array_equal(np.concatenate(found, axis=1), dataset[index].audio_ids_concat)
        assert row["length"] == dataset.lengths[index]
