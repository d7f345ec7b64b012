"""The code cache: what is written is read, what is damaged is found, what changes is noticed."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ds_higgs.data.build import Preparation, build_dataset
from ds_higgs.data.cache import CodeCache, EncodedClip, clip_key
from ds_higgs.data.clips import MAX_MEMO_FILES, HashMemo
from ds_higgs.errors import UserError
from ds_higgs.files import hash_file
from tests.support.patience import HANG_S

from .audio_files import cloning_sample, write_tone
from .conftest import write_mixed_manifest

IDENTITY = "0123456789abcdef0123"


def random_clips(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{seed:016x}{index:016x}": EncodedClip(torch.randint(1024, (8, 5 + index), generator=generator), 0.2 * index)
        for index in range(count)
    }


@pytest.fixture
def cache(tmp_path):
    return CodeCache(tmp_path, IDENTITY)


def test_what_is_added_is_read_by_another_process_too(cache, tmp_path):
    clips = random_clips(3) | random_clips(2, seed=1)
    cache.add_shard(random_clips(3))
    cache.add_shard(random_clips(2, seed=1))
    other = CodeCache(tmp_path, IDENTITY)
    other.scan()
    for reader in (cache, other):
        assert len(reader) == 5
        for key, clip in clips.items():
            assert torch.equal(reader.read(key), clip.codes)
            assert reader[key].seconds == clip.seconds


def test_codecs_do_not_share_clips(cache, tmp_path):
    cache.add_shard(random_clips(2))
    other = CodeCache(tmp_path, "f" * 20)
    other.scan()
    assert len(other) == 0


def test_keys_tell_content_segment_and_codec_apart():
    variants = [
        clip_key(content, offset=offset, duration=duration, codec_identity=codec)
        for content in ("a", "b")
        for offset in (0.0, 1.0)
        for duration in (None, 1.0)
        for codec in ("c", "d")
    ]
    assert len(set(variants)) == 16


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "longer", "not safetensors"])
def test_a_shard_that_is_no_whole_file_is_deleted_by_the_next_scan(cache, tmp_path, damage):
    cache.add_shard(random_clips(3))
    cache.add_shard(random_clips(3, seed=1))
    path = sorted(cache.folder.glob("shard-*"))[0]
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-10],
            "empty": b"",
            "header": content[:20] + b"\xff" * 30 + content[50:],
            "longer": content + b"x",
            "not safetensors": (2**40).to_bytes(8, "little") + b"x" * 100,
        }[damage]
    )
    fresh = CodeCache(tmp_path, IDENTITY)
    fresh.scan()
    assert len(fresh) == 3
    assert not path.exists()


def test_altered_codes_are_found_by_their_checksum(cache):
    cache.add_shard(random_clips(3))
    cache.add_shard(random_clips(3, seed=1))
    path = sorted(cache.folder.glob("shard-*"))[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)

    assert cache.remove_corrupt() == []
    assert not path.exists()
    assert len(cache) == 3


def test_reading_altered_codes_is_an_error(cache):
    clips = random_clips(1)
    cache.add_shard(clips)
    (path,) = cache.folder.glob("shard-*")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="the code cache is damaged"):
        cache.read(next(iter(clips)))


def prepare(manifest, rules, cache_dir):
    preparation = Preparation(manifest, rules=rules, cache_dir=cache_dir)
    preparation.analyse()
    preparation.encode(devices=["cpu"])
    return preparation


@pytest.fixture
def count_encoded(monkeypatch):
    """How many clips the codec has encoded."""
    from ds_higgs.data.codec.dac import DacCodec

    lengths = []
    encode = DacCodec.encode_each

    def spy(self, waveforms):
        lengths.extend(map(len, waveforms))
        return encode(self, waveforms)

    monkeypatch.setattr(DacCodec, "encode_each", spy)
    return lambda: len(lengths)


def test_each_clip_is_encoded_once_however_often_it_is_used(tmp_path, make_rules, count_encoded):
    manifest = write_mixed_manifest(tmp_path / "data", num_cloning=3)
    (tmp_path / "data" / "copy.flac").write_bytes((tmp_path / "data" / "target0.flac").read_bytes())
    samples = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([*samples, cloning_sample("reference0.wav", "copy.flac")]))

    prepare(manifest, make_rules(), tmp_path / "cache")
    assert count_encoded() == 5  # three targets, two references
    prepare(manifest, make_rules(), tmp_path / "cache")
    assert count_encoded() == 5


def test_a_damaged_shard_is_encoded_again(tmp_path, make_rules, count_encoded):
    manifest = write_mixed_manifest(tmp_path / "data", num_cloning=3)
    dataset = prepare(manifest, make_rules(), tmp_path / "cache").dataset()
    expected = [dataset[index].audio_ids_concat for index in range(len(dataset))]
    (shard,) = (tmp_path / "cache").glob("codes/*/shard-*")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 255
    shard.write_bytes(content)

    dataset = prepare(manifest, make_rules(), tmp_path / "cache").dataset()

    assert count_encoded() == 10
    for index, codes in enumerate(expected):
        assert torch.equal(dataset[index].audio_ids_concat, codes)


def test_a_changed_audio_file_is_noticed(tmp_path, make_rules, count_encoded):
    manifest = write_mixed_manifest(tmp_path / "data", num_cloning=3)
    before = prepare(manifest, make_rules(), tmp_path / "cache").dataset()
    path = tmp_path / "data" / "target1.flac"
    size = path.stat().st_size
    path.unlink()
    write_tone(path, 0.5, pitch=500)
    os.truncate(path, max(size, path.stat().st_size))

    after = prepare(manifest, make_rules(), tmp_path / "cache").dataset()

    assert count_encoded() == 6
    changed = [not np.array_equal(before[i].audio_ids_concat, after[i].audio_ids_concat) for i in range(3)]
    assert changed == [False, True, False]


def test_the_hash_memo_reads_a_file_once_and_merges_its_own_files(tmp_path, monkeypatch):
    from ds_higgs.data import clips

    hashed = []
    hash_file = clips.hash_file
    monkeypatch.setattr(clips, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    for index in range(MAX_MEMO_FILES + 3):
        memo = HashMemo(tmp_path / "cache")
        memo.hash(write_tone(tmp_path / f"{index}.wav", 0.1))
        memo.save()
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) < 5
    memo = HashMemo(tmp_path / "cache")
    for index in range(MAX_MEMO_FILES + 3):
        memo.hash(tmp_path / f"{index}.wav")
    assert len(hashed) == MAX_MEMO_FILES + 3


def test_a_header_damaged_anywhere_is_found_or_harmless(tmp_path):
    """Never a traceback, and never a clip with other codes or another length than was written."""
    written = random_clips(4) | random_clips(3, seed=1)
    folder = CodeCache(tmp_path, IDENTITY).folder
    chance = random.Random(0)
    found_damage = 0
    for _ in range(80):
        cache = CodeCache(tmp_path, IDENTITY)
        cache.add_shard(random_clips(4))
        cache.add_shard(random_clips(3, seed=1))
        path = chance.choice(sorted(folder.glob("shard-*")))
        content = bytearray(path.read_bytes())
        header = range(8 + int.from_bytes(content[:8], "little"))
        if chance.random() < 0.5:  # a digit for a digit: JSON still, but not what was written
            place = chance.choice([place for place in header if chr(content[place]).isdigit()])
            content[place] = ord("0") + (content[place] - ord("0") + chance.randrange(1, 10)) % 10
        else:
            place = chance.choice(header)
            content[place : place + chance.randrange(2)] = bytes(chance.choices(b'{}[]",:x\xff', k=1))
        path.write_bytes(content)

        fresh = CodeCache(tmp_path, IDENTITY)
        fresh.scan()
        fresh.remove_corrupt()

        found_damage += not path.exists()
        for key in set(written) & {key for key in written if key in fresh}:
            assert torch.equal(fresh.read(key), written[key].codes)
            assert fresh[key].seconds == written[key].seconds
    assert found_damage > 60


@pytest.mark.parametrize(
    "header", [b"[" * 5000, b"[]", b'{"__metadata__": 3}', b'{"a": 0, "__metadata__": {"clips": "{}"}}']
)
def test_a_header_that_is_no_header_is_deleted_with_a_warning(cache, tmp_path, caplog, header):
    path = cache.folder / "shard-x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    cache.scan()
    assert not path.exists()
    assert "shard-x.safetensors: damaged" in caplog.text


def test_a_shard_of_before_the_headers_checksum_is_read(cache, tmp_path):
    clips = random_clips(2)
    cache.add_shard(clips)
    (path,) = cache.folder.glob("shard-*")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in clips}
    del metadata["checksum"]
    save_file(tensors, path, metadata=metadata)
    other = CodeCache(tmp_path, IDENTITY)
    other.scan()
    assert all(torch.equal(other.read(key), clip.codes) for key, clip in clips.items())


def test_a_cache_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file: Not a directory"):
        CodeCache(tmp_path / "file", IDENTITY)


@pytest.fixture
def shared_folder():
    """A folder that another user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_another_user(action):
    """What `action` returns or raises in a process that may not write what this one has written."""

    def act(answers):
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            answers.put(action())
        except Exception as error:
            answers.put(error)

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=act, args=(answers,))
    process.start()
    answer = answers.get(timeout=HANG_S)
    process.join()
    return answer


def write_protect(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_complete_cache_of_another_user_is_read(shared_folder, make_rules):
    manifest, cache_dir, rules = (
        write_mixed_manifest(shared_folder / "data", num_cloning=3),
        shared_folder / "c",
        make_rules(),
    )
    dataset = prepare(manifest, rules, cache_dir).dataset()
    expected = [dataset[index].audio_ids_concat.tolist() for index in range(len(dataset))]
    for file in (cache_dir / "hashes").iterdir():
        file.unlink()  # so that a hash is to be remembered too
    write_protect(cache_dir)

    def read():
        found = build_dataset(manifest, rules=rules, cache_dir=cache_dir)
        return [found[index].audio_ids_concat.tolist() for index in range(len(found))]

    assert as_another_user(read) == expected


def test_a_cache_of_another_user_that_lacks_clips_is_refused(shared_folder, make_rules):
    manifest, cache_dir, rules = (
        write_mixed_manifest(shared_folder / "data", num_cloning=3),
        shared_folder / "c",
        make_rules(),
    )
    prepare(manifest, rules, cache_dir)
    (shard,) = cache_dir.glob("codes/*/shard-*")
    shard.write_bytes(shard.read_bytes()[:-3])
    write_protect(cache_dir)
    error = as_another_user(lambda: build_dataset(manifest, rules=rules, cache_dir=cache_dir))
    assert isinstance(error, UserError)
    assert re.search("data.cache_dir: .* cannot be written to add 5 missing clips: Permission denied", str(error))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_in_the_file_system_clips_are_encoded_all_the_same(tmp_path, make_rules, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    manifest = write_mixed_manifest(tmp_path / "data", num_cloning=3)
    assert len(prepare(manifest, make_rules(), tmp_path / "cache").dataset()) == 5


@pytest.fixture
def twins(tmp_path):
    """Two data sets, whose audio differs but has the same name, size and time of change."""
    paths = [write_tone(tmp_path / name / "1.wav", 0.2, pitch=pitch) for name, pitch in (("a", 200), ("b", 300))]
    for path in paths:
        os.utime(path, (1e9, 1e9))
    assert paths[0].stat().st_size == paths[1].stat().st_size
    return paths


def test_the_hash_memo_tells_data_sets_with_the_same_relative_paths_apart(twins, tmp_path, monkeypatch):
    for path in twins:
        monkeypatch.chdir(path.parent)
        memo = HashMemo(tmp_path / "cache")
        assert memo.hash(Path("1.wav")) == hash_file(path)
        memo.save()


def test_the_hash_memo_notices_a_file_put_in_anothers_place_with_its_size_and_time(twins, tmp_path):
    memo = HashMemo(tmp_path / "cache")
    memo.hash(twins[0])
    memo.save()
    expected = hash_file(twins[1])
    twins[1].rename(twins[0])
    assert HashMemo(tmp_path / "cache").hash(twins[0]) == expected


@pytest.mark.parametrize("content", [b"\xff", b"[]", b'{"/a.wav": [1, 2, "x"]}', b"[" * 5000])
def test_a_damaged_hash_memo_is_as_none(twins, tmp_path, content):
    (tmp_path / "cache" / "hashes").mkdir(parents=True)
    (tmp_path / "cache" / "hashes" / "0.json").write_bytes(content)
    assert HashMemo(tmp_path / "cache").hash(twins[0]) == hash_file(twins[0])
