"""The code cache: what is written is read, what is damaged is found, what changes is noticed."""

import json
import os

import numpy as np
import pytest
import torch

from ds_higgs.data.build import Preparation
from ds_higgs.data.cache import CodeCache, EncodedClip, clip_key
from ds_higgs.data.clips import MAX_MEMO_FILES, HashMemo
from ds_higgs.errors import UserError

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

    assert cache.remove_corrupt() == [path.name]
    assert len(cache) == 3
    assert cache.remove_corrupt() == []


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
    encode = DacCodec.encode

    def spy(self, waveforms):
        lengths.extend(map(len, waveforms))
        return encode(self, waveforms)

    monkeypatch.setattr(DacCodec, "encode", spy)
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
