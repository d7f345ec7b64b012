"""Audio inside tar archives, Parquet and Arrow files is read where it lies, a little at a time."""

import io
import json
import random
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from ds_higgs.data.audio import Segment, hash_audio, read_frames
from ds_higgs.data.build import Preparation, build_dataset
from ds_higgs.data.containers import opening
from ds_higgs.data.containers.opening import open_audio
from ds_higgs.data.encoding import plan_units
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.shares.dealing import Share
from ds_higgs.data.shares.joining import ShareJoin
from ds_higgs.data.shares.making import ShareMaker
from ds_higgs.errors import UserError
from ds_higgs.files import hash_file

from .audio_files import RATE, cloning_sample, tone, write_tone

CLIPS = 12
AUDIO_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_tar(path, members):
    """members: bytes by name."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def write_tables(folder, contents, *, row_group_size=5):
    """The same rows as rows.parquet and rows.arrow."""
    rows = [{"speech": {"bytes": content, "path": None}, "raw": content} for content in contents]
    table = pa.Table.from_pylist(rows, schema=pa.schema([("speech", AUDIO_TYPE), ("raw", pa.binary())]))
    pq.write_table(table, folder / "rows.parquet", row_group_size=row_group_size)
    with pa.ipc.new_stream(folder / "rows.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=4)


@pytest.fixture
def folder(tmp_path):
    """CLIPS recordings as files, in two shards, and in both kinds of tables."""
    files = [
        write_tone(tmp_path / "data" / f"{index}.wav", 0.2 + 0.02 * index, pitch=100 + 20 * index, seed=index)
        for index in range(CLIPS)
    ]
    contents = [path.read_bytes() for path in files]
    for shard in range(2):
        write_tar(tmp_path / "data" / f"{shard}.tar", {f"a/{n}.wav": contents[n] for n in range(shard, CLIPS, 2)})
    write_tables(tmp_path / "data", contents)
    return tmp_path / "data"


NAMES = {
    "file": "{0}.wav",
    "tar": "{1}.tar::a/{0}.wav",
    "parquet": "rows.parquet::speech[{0}]",
    "arrow": "rows.arrow::raw[{0}]",
}


def write_manifest(folder, form):
    names = [NAMES[form].format(index, index % 2) for index in range(CLIPS)]
    samples = [cloning_sample(names[index], names[(index + 5) % CLIPS]) for index in range(CLIPS)]
    path = folder / f"{form}.json"
    path.write_text(json.dumps(samples))
    return path


def audio_of(dataset):
    return [dataset[index].audio_ids_concat.tolist() for index in range(len(dataset))]


@pytest.mark.parametrize("form", ["tar", "parquet", "arrow"])
def test_a_recording_is_the_same_wherever_it_lies(folder, form):
    for index in random.Random(0).choices(range(CLIPS), k=3 * CLIPS):
        file, inside = (folder / NAMES[name].format(index, index % 2) for name in ("file", form))
        assert hash_audio(inside) == hash_file(file)
        samples, rate = read_frames(inside, Segment(0.05, 0.1))
        expected, _ = read_frames(file, Segment(0.05, 0.1))
        assert rate == RATE
        assert np.array_equal(samples, expected)


def test_codes_are_found_again_by_content_wherever_the_audio_lies(folder, make_rules, tmp_path):
    cache, expected = tmp_path / "cache", None
    for form in NAMES:
        preparation = Preparation(write_manifest(folder, form), rules=make_rules(), cache_dir=cache)
        preparation.run(on_bad_sample="error", devices=["cpu"])
        found = audio_of(preparation.dataset())
        assert preparation.num_missing == (CLIPS if expected is None else 0)
        assert found == (expected := expected or found)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_audio_in_larger_files_is_encoded_from_there(folder, make_rules, tmp_path, form):
    expected = audio_of(build_dataset(write_manifest(folder, "file"), rules=make_rules(), cache_dir=tmp_path / "files"))
    manifest, rules, cache = write_manifest(folder, form), make_rules(), tmp_path / "cache"
    for path in folder.glob("*.wav"):
        path.unlink()
    for number in (1, 2):
        ShareMaker(manifest, Share(number, 2), rules=rules, cache_dir=cache).run(devices=["cpu"])
    shares = ShareJoin(manifest, rules=rules, roots=[cache])
    assert shares.take_in(cache) == CLIPS
    joined = build_dataset(manifest, rules=rules, cache_dir=cache, known=shares.known_files())
    assert audio_of(joined) == expected


def test_a_recording_changed_inside_its_archive_is_noticed(folder, make_rules, tmp_path):
    manifest = write_manifest(folder, "tar")
    build_dataset(manifest, rules=make_rules(), cache_dir=tmp_path / "cache")
    changed = {f"a/{n}.wav": (folder / f"{n}.wav").read_bytes() for n in range(1, CLIPS, 2)}
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.5, pitch=700), RATE, format="WAV")
    write_tar(folder / "1.tar", changed | {"a/3.wav": buffer.getvalue()})
    preparation = Preparation(manifest, rules=make_rules(), cache_dir=tmp_path / "cache")
    preparation.run(on_bad_sample="error", devices=["cpu"])
    assert preparation.num_missing == 1


def test_a_unit_is_of_one_archive_and_of_rows_in_order(folder, make_rules, tmp_path):
    for form, key in (("tar", lambda path: path.partition("::")[0]), ("parquet", lambda path: "")):
        manifest = write_manifest(folder, form)
        maker = ShareMaker(manifest, Share(1, 1), rules=make_rules(), cache_dir=tmp_path)
        maker.run(devices=[], skip_bad=True)
        preparation = Preparation(manifest, rules=make_rules(), cache_dir=tmp_path)
        preparation.analyse()
        preparation.encode()
        units = [[preparation._clips[number].path for number in unit.clips] for unit in plan_units(preparation._clips)]
        assert all(len(set(map(key, unit))) == 1 for unit in units)
        assert len(units) == (2 if form == "tar" else 1)
        if form == "parquet":
            assert [path.rpartition("[")[2] for path in units[0]] == [f"{row}]" for row in range(CLIPS)]


def test_an_archive_is_never_in_memory(tmp_path):
    write_tar(tmp_path / "large.tar", {f"{n}.wav": bytes(4 << 20) for n in range(8)} | {"small.wav": b"1" * 1000})
    tracemalloc.start()
    try:
        with open_audio(tmp_path / "large.tar::7.wav") as file:
            assert file.read(10) == bytes(10)
        assert len(hash_audio(tmp_path / "large.tar::6.wav")) == 64
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_of_a_parquet_file_one_row_group_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "_containers", opening._OpenContainers())
    noise, rows, size = np.random.default_rng(0), 256, 50_000
    write_tables(tmp_path, [noise.bytes(size) for _ in range(rows)], row_group_size=32)
    before, allocated = pa.total_allocated_bytes(), []
    for row in range(rows):
        with open_audio(tmp_path / f"rows.parquet::speech[{row}]") as file:
            assert len(file.read()) == size
        allocated.append(pa.total_allocated_bytes() - before)
    assert 0 < max(allocated) < rows * size / 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.tar::a/99.wav", "there is no 'a/99.wav' in 0.tar"),
        ("absent.tar::a/0.wav", "file not found"),
        ("rows.parquet::speech[12]", r"there is no 'speech\[12\]' in rows.parquet"),
        ("rows.parquet::text[0]", r"there is no 'text\[0\]' in rows.parquet"),
        ("rows.arrow::speech", "there is no 'speech' in rows.arrow"),
        ("rows.arrow::speech[-1]", r"there is no 'speech\[-1\]' in rows.arrow"),
        ("cut.tar::a/10.wav", "cut.tar is no tar archive: unexpected end of data"),
        ("zipped.tar::a/0.wav", "zipped.tar is no tar archive: .* not compressed"),
        ("text.parquet::speech[0]", "text.parquet is no Parquet file"),
        ("text.arrow::speech[0]", "text.arrow is no Arrow stream"),
        ("damaged.parquet::speech[1]", "row 1 of the Parquet file cannot be read"),
        ("null.parquet::speech[0]", r"speech\[0\] holds no audio"),
    ],
)
def test_what_cannot_be_read_is_told(folder, make_rules, tmp_path, name, message):
    (folder / "cut.tar").write_bytes((folder / "0.tar").read_bytes()[:90_000])
    with tarfile.open(folder / "zipped.tar", "w:gz"):
        pass
    for suffix in ("parquet", "arrow"):
        (folder / f"text.{suffix}").write_text("Neither.")
    content = bytearray((folder / "rows.parquet").read_bytes())
    content[4:2000] = bytes(1996)
    (folder / "damaged.parquet").write_bytes(content)
    pq.write_table(pa.table({"speech": pa.array([None], AUDIO_TYPE)}), folder / "null.parquet")
    manifest = folder / "train.json"
    manifest.write_text(json.dumps([cloning_sample("0.wav", name)]))
    with pytest.raises(UserError, match=message):
        build_dataset(manifest, rules=make_rules(), cache_dir=tmp_path / "cache")


def test_a_file_of_its_own_may_have_such_a_name(tmp_path):
    path = write_tone(tmp_path / "a::b.wav")
    assert hash_audio(path) == hash_file(path)


def test_few_files_are_held_open(folder, monkeypatch):
    monkeypatch.setattr(opening, "_MAX_WEIGHT", 10)
    monkeypatch.setattr(opening, "_containers", opening._OpenContainers())
    for index in range(CLIPS):
        for form in ("tar", "parquet"):
            open_audio(folder / NAMES[form].format(index, index % 2)).close()
            assert len(opening._containers._open) == 1


def test_an_error_inside_is_a_bad_sample(folder):
    with pytest.raises(BadSampleError, match="there is no"):
        hash_audio(folder / "0.tar::nothing")
