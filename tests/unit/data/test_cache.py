"""The code cache: what is written is read, what is damaged is found, what changes is noticed."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ds_higgs.data.build import Preparation, build_dataset
from ds_higgs.data.cache import CodeCache, clip_key
from ds_higgs.data.clip_files import EncodedClip
from ds_higgs.data.clips import MAX_MEMO_FILES, HashMemo
from ds_higgs.data.key_index import KeyIndex
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


def in_shards(clips, codec_identity, folder, name="shard-0"):
    """A file of clips as earlier versions wrote them."""
    tensors = {key: clip.codes.to(torch.int16).contiguous() for key, clip in clips.items()}
    crc = {key: zlib.crc32(tensor.numpy().tobytes()) for key, tensor in tensors.items()}
    index = json.dumps({key: [crc[key], clips[key].seconds] for key in tensors})
    metadata = {"codec": codec_identity, "clips": index, "checksum": str(zlib.crc32(index.encode()))}
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


def assert_holds(cache, clips):
    assert len(cache) == len(clips)
    for key, clip in clips.items():
        assert torch.equal(cache.read(key), clip.codes)
        assert cache.seconds_of(key) == clip.seconds


@pytest.mark.parametrize("tidy", [False, True])
def test_what_is_added_is_read_by_another_process_too(cache, tmp_path, tidy):
    cache.add(random_clips(3))
    cache.add(random_clips(2, seed=1))
    if tidy:
        cache.tidy()
        assert [path.name for path in cache.folder.rglob("*.arrow")] == [
            path.name for path in cache.folder.glob("clips-*")
        ]
    other = CodeCache(tmp_path, IDENTITY)
    for reader in (cache, other):
        reader.scan()
        assert_holds(reader, random_clips(3) | random_clips(2, seed=1))


def test_codecs_do_not_share_clips(cache, tmp_path):
    cache.add(random_clips(2))
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


def test_keys_that_begin_alike_are_told_apart():
    keys = np.asarray([[1] * 8 + [other] * 8 for other in (3, 1, 2)] + [[0] * 16, [1] * 8 + [1] * 8], dtype=np.uint8)
    index = KeyIndex(keys)
    wanted = np.asarray([[1] * 8 + [other] * 8 for other in (1, 2, 3, 4)] + [[0] * 16, [9] * 16], dtype=np.uint8)
    assert index.find(wanted).tolist() == [1, 2, 0, -1, 3, -1]
    assert [index.find_one(key.tobytes()) for key in wanted] == [1, 2, 0, -1, 3, -1]


def test_a_unit_is_added_to_and_only_what_it_lacks_is_missing(cache, tmp_path):
    clips = random_clips(4)
    keys = np.frombuffer(bytes.fromhex("".join(clips)), np.uint8).reshape(-1, 16)
    first = dict(list(clips.items())[:2])
    cache.add(first, unit=7)
    other = CodeCache(tmp_path, IDENTITY)
    assert other.missing(7, keys).tolist() == [False, False, True, True]
    other.add({key: clip for key, clip in clips.items() if key not in first}, unit=7)
    assert not CodeCache(tmp_path, IDENTITY).missing(7, keys).any()
    cache.tidy()
    assert not other.missing(7, keys).any(), "joined to a large file by another process"
    other.scan()
    assert_holds(other, clips)


def test_small_files_are_joined_and_the_folder_is_one_of_datasets(cache, tmp_path):
    clips = {}
    for seed in range(12):
        clips |= random_clips(2, seed=seed)
        cache.add(random_clips(2, seed=seed))
        cache.tidy()
    names = sorted(path.name for path in cache.folder.glob("clips-*"))
    assert len(names) < 12
    assert [file["filename"] for file in json.loads((cache.folder / "state.json").read_text())["_data_files"]] == names
    assert_holds(cache, clips)


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "longer", "not arrow"])
def test_a_file_that_is_no_whole_file_is_deleted_by_the_next_scan(cache, tmp_path, damage, caplog):
    cache.add(random_clips(3), unit=1)
    cache.add(random_clips(3, seed=1), unit=2)
    path = sorted(cache.folder.glob("units/*"))[0]
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-10],
            "empty": b"",
            "header": b"\xff" * 50 + content[50:],
            "longer": content + b"x",
            "not arrow": b"x" * 100,
        }[damage]
    )
    fresh = CodeCache(tmp_path, IDENTITY)
    fresh.scan()
    assert len(fresh) == 3
    assert not path.exists()
    assert f"{path}: damaged" in caplog.text


def alter_codes(folder, clip):
    """Flip a bit in the codes of a clip, in whichever file of the cache they are."""
    codes = clip.codes.to(torch.int16).numpy().tobytes()
    for path in folder.rglob("*.arrow"):
        content = bytearray(path.read_bytes())
        place = content.find(codes)
        if place >= 0:
            content[place + 4] ^= 1
            path.write_bytes(content)
            return path
    raise AssertionError("no such codes")


def test_reading_altered_codes_is_an_error_and_tidying_keeps_the_other_clips(cache, tmp_path, caplog):
    clips = random_clips(3)
    cache.add(clips)
    cache.tidy()
    key = list(clips)[1]
    path = alter_codes(cache.folder, clips[key])
    damaged = CodeCache(tmp_path, IDENTITY)
    damaged.scan()
    with pytest.raises(UserError, match=f"{path.name}: the code cache is damaged"):
        damaged.read(key)
    damaged.tidy()
    assert "damaged (1 clips fail their checksum)" in caplog.text
    assert_holds(damaged, {other: clip for other, clip in clips.items() if other != key})


def test_codes_of_an_earlier_version_are_carried_over(cache, tmp_path, caplog):
    whole, altered, cut = random_clips(3), random_clips(2, seed=1), random_clips(2, seed=2)
    paths = [
        in_shards(clips, IDENTITY, cache.folder, f"shard-{number}")
        for number, clips in enumerate((whole, altered, cut))
    ]
    content = bytearray(paths[1].read_bytes())
    content[-5] ^= 1  # of the last clip
    paths[1].write_bytes(content)
    paths[2].write_bytes(paths[2].read_bytes()[:-3])
    cache.tidy()
    assert not list(cache.folder.glob("shard-*"))
    assert_holds(cache, whole | dict(list(altered.items())[:1]))
    assert caplog.text.count("damaged") == 2


def test_a_shard_of_before_the_headers_checksum_is_carried_over(cache):
    clips = random_clips(2)
    path = in_shards(clips, IDENTITY, cache.folder)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in clips}
    del metadata["checksum"]
    save_file(tensors, path, metadata=metadata)
    cache.tidy()
    assert_holds(cache, clips)


@pytest.mark.parametrize(
    "header", [b"[" * 5000, b"[]", b'{"__metadata__": 3}', b'{"a": 0, "__metadata__": {"clips": "{}"}}']
)
def test_a_shard_whose_header_is_no_header_goes_with_a_warning(cache, caplog, header):
    path = cache.folder / "shard-x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    cache.tidy()
    assert not path.exists()
    assert "shard-x.safetensors: damaged" in caplog.text


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


def test_a_damaged_clip_is_found_when_it_is_read_and_it_alone_is_encoded_again(tmp_path, make_rules, count_encoded):
    manifest = write_mixed_manifest(tmp_path / "data", num_cloning=3)
    dataset = prepare(manifest, make_rules(), tmp_path / "cache").dataset()
    expected = [dataset[index].audio_ids_concat for index in range(len(dataset))]
    alter_codes(tmp_path / "cache" / "codes", EncodedClip(dataset[1].get_audio_codes(1), 0.0))

    damaged = prepare(manifest, make_rules(), tmp_path / "cache").dataset()
    with pytest.raises(UserError, match=r"clips-.*arrow: the code cache is damaged; start again"):
        damaged[1]
    mended = prepare(manifest, make_rules(), tmp_path / "cache").dataset()

    assert count_encoded() == 5 + 1
    for index, codes in enumerate(expected):
        assert torch.equal(mended[index].audio_ids_concat, codes)


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
    hash_audio = clips.hash_audio
    monkeypatch.setattr(clips, "hash_audio", lambda path: hashed.append(path) or hash_audio(path))
    for index in range(MAX_MEMO_FILES + 3):
        memo = HashMemo(tmp_path / "cache")
        memo.hash(write_tone(tmp_path / f"{index}.wav", 0.1))
        memo.save()
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) < 5
    memo = HashMemo(tmp_path / "cache")
    for index in range(MAX_MEMO_FILES + 3):
        memo.hash(tmp_path / f"{index}.wav")
    assert len(hashed) == MAX_MEMO_FILES + 3


def test_a_file_damaged_anywhere_is_found_or_harmless(tmp_path):
    """Never a traceback, and never a clip with other codes or another length than was written."""
    written = random_clips(4)
    folder = CodeCache(tmp_path, IDENTITY).folder
    chance = random.Random(0)
    found_damage = 0
    for _ in range(80):
        cache = CodeCache(tmp_path, IDENTITY)
        cache.add(written, unit=1)
        [path] = folder.glob("units/*")
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)

        fresh = CodeCache(tmp_path, IDENTITY)
        fresh.scan()
        fresh.tidy()
        found_damage += len(fresh) < len(written)
        for key in written:
            if key in fresh:
                assert torch.equal(fresh.read(key), written[key].codes)
                assert fresh.seconds_of(key) == written[key].seconds
        for left in folder.rglob("*.arrow"):
            left.unlink()
    assert found_damage > 40


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
    prepare(manifest, rules, cache_dir).dataset()
    (file,) = cache_dir.glob("codes/*/clips-*")
    file.write_bytes(file.read_bytes()[:-3])
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
