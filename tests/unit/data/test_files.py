"""Files that appear whole or not at all, and locks between processes."""

import multiprocessing
import os
import time

import pytest

from ds_higgs.data.files import NumberLocks, hash_file, remove_leftovers, write_atomically


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def disk_full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(path.read_bytes()), fsync(number)))
    with open(path, "rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"


def test_only_old_leftovers_are_deleted(tmp_path):
    fresh, old, other = (tmp_path / name for name in (".a.1.tmp", ".b.2.tmp", "shard"))
    for path in (fresh, old, other):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".a.1.tmp", "shard"]


def try_to_hold(path, number, found):
    with NumberLocks(path).hold(number, wait=False) as held:
        found.put(held)


def test_a_lock_keeps_other_processes_out_of_its_number_alone(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()

    def ask_another_process(number):
        process = context.Process(target=try_to_hold, args=(tmp_path / "locks", number, found))
        process.start()
        answer = found.get(timeout=20)
        process.join()
        return answer

    locks = NumberLocks(tmp_path / "locks")
    with locks.hold(7, wait=True) as held:
        assert held
        assert not ask_another_process(7)
        assert ask_another_process(8)
    assert ask_another_process(7)


def test_the_hash_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
