"""One run at a time in a folder: who holds it, what is left of one that was killed, file systems without locks."""

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ds_higgs.errors import UserError
from ds_higgs.job import run_lock
from ds_higgs.job.run_lock import Holder, RunLock
from tests.support.patience import HANG_S

fork = multiprocessing.get_context("fork")


def hold(run_dir, is_held, may_end):
    lock = RunLock(run_dir)
    lock.acquire()
    is_held.set()
    may_end.wait(60)
    lock.release()


@contextmanager
def another_holder(run_dir):
    is_held, may_end = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(run_dir, is_held, may_end))
    process.start()
    try:
        assert is_held.wait(30)
        yield process, may_end
    finally:
        process.kill()
        process.join()


def test_the_second_is_told_who_has_the_folder(tmp_path):
    with another_holder(tmp_path / "run") as (process, _):
        with pytest.raises(UserError) as refused:
            RunLock(tmp_path / "run", patience_s=0.3).acquire()
        assert f"in use by process {process.pid} on {socket.gethostname()}, started 0 s ago" in str(refused.value)
        assert process.is_alive()


def test_a_killed_holders_lock_is_taken_over_at_once(tmp_path, caplog):
    with another_holder(tmp_path / "run") as (process, _):
        process.kill()
        process.join()
    started = time.monotonic()
    with RunLock(tmp_path / "run"):
        assert time.monotonic() - started < 1
    assert f"process {process.pid}" in caplog.text


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path):
    with another_holder(tmp_path / "run") as (process, may_end):
        threading.Timer(0.5, may_end.set).start()
        with RunLock(tmp_path / "run"):
            process.join(10)
            assert not process.is_alive()


def test_nothing_is_left_of_a_lock_that_was_let_go(tmp_path):
    with RunLock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "metrics.jsonl").touch()
    with RunLock(tmp_path):
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def left_behind(run_dir, *, seconds_ago):
    """The lock file of a process of another machine, or of this one before it started anew."""
    run_dir.mkdir()
    path = run_dir / run_lock.LOCK_FILE
    holder = {"host": "node7", "process": 4711, "boot": "another", "started": time.time() - 7500, "token": "t"}
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["locks of this machine alone", "no locks"])
def weak_file_system(request, monkeypatch):
    """File systems on which no lock tells of another machine's processes."""
    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "lockf", no_locks)
        monkeypatch.setattr(run_lock, "_CONFIRM_SECONDS", 0.2)


@pytest.mark.usefixtures("weak_file_system")
def test_another_machines_holder_is_known_by_its_beat(tmp_path):
    path = left_behind(tmp_path / "run", seconds_ago=1)
    threading.Timer(0.5, os.utime, [path]).start()
    with pytest.raises(UserError, match="process 4711 on node7, started 2 h 5 min ago"):
        RunLock(tmp_path / "run", silence_s=20).acquire()


@pytest.mark.usefixtures("weak_file_system")
@pytest.mark.parametrize(("seconds_ago", "waits"), [(1, 1.0), (1e6, 0.0)])
def test_another_machines_holder_that_is_silent_is_taken_over(tmp_path, seconds_ago, waits):
    left_behind(tmp_path / "run", seconds_ago=seconds_ago)
    started = time.monotonic()
    with RunLock(tmp_path / "run", silence_s=2):
        assert time.monotonic() - started == pytest.approx(waits, abs=0.9)


def test_a_holder_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with RunLock(tmp_path / "run") as lock:
        os.utime(lock.path, (0, 0))
        deadline = time.monotonic() + 20
        while lock.path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lock.path.stat().st_mtime > 0


def compete(run_dir, results, locks):
    if not locks:
        fcntl.lockf = no_locks
    lock = RunLock(run_dir, patience_s=0)
    try:
        lock.acquire()
    except UserError:
        results.put("refused")
    else:
        results.put("held")
        threading.Event().wait(60)


@pytest.mark.parametrize("locks", [True, False])
def test_of_many_that_start_at_once_one_goes_on(tmp_path, locks):
    results = fork.Queue()
    processes = [fork.Process(target=compete, args=(tmp_path / "run", results, locks)) for _ in range(4)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=HANG_S) for _ in processes)
    for process in processes:
        process.kill()
        process.join()
    assert found == ["held"] + ["refused"] * 3


def test_each_of_many_in_turn_is_alone(tmp_path):
    """Release and takeover: the file is removed while others wait for it."""
    inside = tmp_path / "inside"
    failures = fork.Queue()

    def work():
        for _ in range(10):
            lock = RunLock(tmp_path / "run", patience_s=60)
            lock.acquire()
            try:
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                time.sleep(0.002)
                inside.unlink()
            except FileExistsError:
                failures.put("two at once")
            lock.release()

    processes = [fork.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert failures.empty()


def test_a_folder_that_goes_while_it_is_taken_is_made_again(tmp_path, monkeypatch):
    """Whoever lets the lock go removes an empty folder, at any moment of who comes next."""
    run_dir, make, removals = tmp_path / "run", Path.mkdir, iter(range(3))

    def make_and_lose(folder, **options):
        make(folder, **options)
        if folder == run_dir and next(removals, None) is not None:
            folder.rmdir()

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    with RunLock(run_dir):
        assert (run_dir / run_lock.LOCK_FILE).exists()
    assert next(removals, None) is None


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run.output_dir: .*file cannot be written: File exists"):
        RunLock(tmp_path / "file").acquire()


def test_a_half_written_lock_file_names_nobody(tmp_path):
    (tmp_path / run_lock.LOCK_FILE).write_text('{"host": "no')
    with RunLock(tmp_path):
        content = json.loads((tmp_path / run_lock.LOCK_FILE).read_text())
        assert Holder(**content).process == os.getpid()
