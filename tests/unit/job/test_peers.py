"""Who is gone: processes as /proc shows them, and for how long somebody has been silent."""

import os
import resource
import signal
import subprocess
import time

from ds_higgs.job.failure_record import Failure
from ds_higgs.job.job_store import Peer
from ds_higgs.job.peers import GAP_SECONDS, SILENCE_SECONDS, SilenceClock, _next_machine
from ds_higgs.job.processes import OtherProcess


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_is_alive_stopped_or_dead():
    child = subprocess.Popen(["sleep", "100"])
    process = OtherProcess(child.pid)
    assert not process.is_dead()
    child.send_signal(signal.SIGSTOP)
    wait_for(process.is_stopped)
    assert not process.is_dead()
    child.kill()
    wait_for(process.is_dead)
    child.wait()
    assert process.is_dead()
    assert OtherProcess(child.pid).is_dead()


def test_without_file_handles_nobody_is_dead():
    process = OtherProcess(os.getpid())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert not process.is_dead()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_silence_counts_only_while_somebody_listens():
    clock = SilenceClock()
    assert clock.observe("beat 1", 100.0) == 0
    assert clock.observe("beat 1", 101.0) == 1
    assert clock.observe("beat 1", 102.0) == 2
    assert clock.observe("beat 1", 132.0) == 0, "this process was suspended for 30 s, and the other may have been"
    for second in range(1, int(SILENCE_SECONDS) + 2):
        silent = clock.observe("beat 1", 132.0 + second)
    assert silent > SILENCE_SECONDS
    assert clock.observe("beat 2", 160.0) == 0
    assert GAP_SECONDS < SILENCE_SECONDS


def test_the_next_machine_is_listened_to_as_a_whole():
    peers = [Peer(rank, 1000 + rank, "abc"[rank // 2], "host") for rank in range(6)]
    heard = {space: [peer.rank for peer in _next_machine(peers, space)] for space in "abc"}
    assert heard == {"a": [2, 3], "b": [4, 5], "c": [0, 1]}
    assert _next_machine(peers[:2], "a") == []


def test_no_peers_word_ends_a_run_well():
    """Whoever reaches the store's port can write there."""
    for word in (
        b'{"rank": 1, "message": "x", "status": 0}',
        b'{"rank": 1, "message": "", "status": null}',
        b"{",
        b"[]",
    ):
        failure = Failure.decode(word)
        assert failure.status == 1
        assert isinstance(failure.summary, str)
    told = Failure(3, "train.json:3: no audio", 2)
    assert Failure.decode(told.encode().encode()) == told
