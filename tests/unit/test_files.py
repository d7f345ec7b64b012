"""Files and folders that appear whole or not at all, their modes, damaged JSON, and locks between processes."""

import errno
import fcntl
import multiprocessing
import os
import re
import resource
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from ds_higgs.errors import UserError
from ds_higgs.files import (
    NumberLocks,
    append_whole,
    begin_folder,
    hash_file,
    mend_folders,
    publish_folder,
    read_json,
    remove_leftovers,
    replaced_whole,
    write_atomically,
    write_json,
)
from tests.support.patience import HANG_S


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
    assert seen == [b"old", b"new"]  # before the rename; after it, when the folder is brought to the disk
    assert path.read_bytes() == b"new"


def test_only_old_leftovers_are_deleted(tmp_path):
    fresh, old, other = (tmp_path / name for name in (".a.1.tmp", ".b.2.tmp", "shard"))
    for path in (fresh, old, other):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".a.1.tmp", "shard"]


def try_to_hold(path, number, found):
    with NumberLocks(path).hold(number) as held:
        found.put(held)


def test_a_lock_keeps_other_processes_out_of_its_number_alone(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()

    def ask_another_process(number):
        process = context.Process(target=try_to_hold, args=(tmp_path / "locks", number, found))
        process.start()
        answer = found.get(timeout=HANG_S)
        process.join()
        return answer

    locks = NumberLocks(tmp_path / "locks")
    with locks.hold(7) as held:
        assert held
        assert not ask_another_process(7)
        assert ask_another_process(8)
    assert ask_another_process(7)


def test_where_there_are_no_locks_everybody_goes_on(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with NumberLocks(tmp_path / "locks").hold(7) as held:
        assert held


def test_the_hash_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def fail_half_way(folder):
    (folder / "weights").write_text("half")
    raise OSError("cannot write")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "adapter"
    for content in ("old", "new"):
        with replaced_whole(folder) as partial:
            (partial / "weights").write_text(content)
    assert (folder / "weights").read_text() == "new"
    with pytest.raises(OSError, match="cannot write"), replaced_whole(folder) as partial:
        fail_half_way(partial)
    assert (folder / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_between_two_renames_loses_no_folder(tmp_path, monkeypatch, renames):
    class Killed(BaseException):
        """What SIGKILL does: nothing after it runs."""

    folder = tmp_path / "adapter"
    partial = begin_folder(folder)
    (partial / "weights").write_text("old")
    publish_folder(partial, folder)
    partial = begin_folder(folder)
    (partial / "weights").write_text("new")
    done, rename = [], Path.rename

    def die_at(path, target):
        if len(done) == renames:
            raise Killed
        done.append(rename(path, target))

    monkeypatch.setattr(Path, "rename", die_at)
    monkeypatch.setattr(shutil, "rmtree", Mock(side_effect=Killed))
    with pytest.raises(Killed):
        publish_folder(partial, folder)
    monkeypatch.undo()
    mend_folders(tmp_path)
    assert (folder / "weights").read_text() == ("new" if renames == 2 else "old")
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_umasks_mode(tmp_path, umask):
    usual = os.umask(umask)
    try:
        write_json(tmp_path / "config.json", {"key": 1})
        with replaced_whole(tmp_path / "adapter") as partial:
            save_file({"weight": torch.zeros(2)}, partial / "weights.safetensors")  # which makes it 0600
    finally:
        os.umask(usual)
    for path in (tmp_path / "config.json", tmp_path / "adapter" / "weights.safetensors"):
        assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~umask)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff", "[" * 100_000, "9" * 5000])
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_json(path)
    with pytest.raises(UserError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")


def test_what_cannot_all_be_appended_is_not_begun(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"first\n")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, usual[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{path}'"):
            append_whole(path, b"second\n")
        assert path.read_bytes() == b"first\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    append_whole(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"
