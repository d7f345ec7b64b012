"""Lock files of killed processes stop no start, those of living ones stay; nothing is shared with other users."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from ds_higgs.errors import UserError
from ds_higgs.job.extensions import loading_extensions, prepare_compiler
from tests.support import launching


def test_a_dead_processs_lock_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale = tmp_path / "deepspeed_shm_comm" / "lock"
    stale.parent.mkdir()
    stale.touch()
    with loading_extensions():
        assert not stale.exists()


def test_a_living_processs_lock_stays_until_it_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    program = (
        "import time; from pathlib import Path; from ds_higgs.job.extensions import loading_extensions\n"
        f"with loading_extensions():\n    Path({str(lock)!r}).touch(); print('loading', flush=True); time.sleep(60)"
    )
    environment = launching.free_environment({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "loading\n"
    with loading_extensions():  # beside it, not after it
        assert lock.exists()
    process.kill()
    process.wait()
    with loading_extensions():
        assert not lock.exists()


def test_each_user_has_a_lock_of_his_own(tmp_path, monkeypatch):
    """Another user's lock file cannot be opened to write, and other users' loads are not ours to judge."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    theirs = tmp_path / "deepspeed_shm_comm" / "lock"
    theirs.parent.mkdir()
    theirs.touch()
    with loading_extensions():
        names = set(os.listdir(tmp_path))
    theirs.touch()
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with loading_extensions():
        assert set(os.listdir(tmp_path)) == names | {"ds_higgs-54321.lock"}
        assert theirs.exists()


def test_without_locks_it_goes_on_and_removes_nothing(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with loading_extensions():
        assert lock.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_the_folder_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that what there was comes back in the end
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    prepare_compiler()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "environment" / "torch_extensions")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "file"))  # an environment that cannot be written
    prepare_compiler()
    assert os.environ["TORCH_EXTENSIONS_DIR"].startswith(str(tmp_path / "cache" / "ds_higgs"))

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    os.chown(tmp_path / "environment" / "torch_extensions", 54321, -1)  # made by another user of the environment
    prepare_compiler()
    assert os.environ["TORCH_EXTENSIONS_DIR"].startswith(str(tmp_path / "cache" / "ds_higgs"))

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="TORCH_EXTENSIONS_DIR: not set"):
        prepare_compiler()


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"TORCH_EXTENSIONS_DIR: .*file cannot be written"), loading_extensions():
        pass
