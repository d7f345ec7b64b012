"""Preparation that is killed at random moments, two processes at once, and finished later."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ds_higgs.data import encoding
from ds_higgs.data.build import Preparation
from ds_higgs.data.codec.dac import DacCodec

from .audio_files import write_chain, write_lines

ROUNDS = 12
CLIPS = 36
UNIT_CLIPS = 3


@pytest.fixture
def manifest(tmp_path):
    folder = tmp_path / "data"
    return write_lines(folder / "train.jsonl", write_chain(folder, CLIPS, longer_by=0.02))


def prepare(manifest: Path, rules, cache_dir: Path, log: Path | None = None):
    """One process's preparation; each call of the codec is logged as [process, fingerprints of its clips]."""
    torch.set_num_threads(1)
    encoding.UNIT_CLIPS = UNIT_CLIPS
    if log is not None:
        encode = DacCodec.encode_each

        def logged(self, waveforms):
            with open(log, "a") as file:
                file.write(json.dumps([os.getpid(), [float(waveform.sum()) for waveform in waveforms]]) + "\n")
            time.sleep(0.02)
            yield from encode(self, waveforms)

        DacCodec.encode_each = logged
    preparation = Preparation(manifest, rules=rules, cache_dir=cache_dir)
    preparation.analyse()
    preparation.encode(devices=["cpu"])
    return preparation


def wait_until_it_grows(log: Path, size: int, processes) -> None:
    """Or until the processes have ended."""
    while any(process.is_alive() for process in processes):
        if log.exists() and log.stat().st_size > size:
            return
        time.sleep(0.005)


def codes_of(dataset):
    return [dataset[index].audio_ids_concat for index in range(len(dataset))]


@pytest.mark.costly
def test_two_processes_at_once_encode_each_clip_once(manifest, make_rules, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    arguments = (manifest, make_rules(), tmp_path / "cache", log)
    processes = [context.Process(target=prepare, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    encoded = [clip for _, clips in calls for clip in clips]
    assert len(encoded) == len(set(encoded)) == CLIPS
    assert len({process for process, _ in calls}) == 2, "one process did all the work"


@pytest.mark.costly
def test_killed_preparations_end_in_the_codes_of_a_clean_one(manifest, make_rules, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "UNIT_CLIPS", UNIT_CLIPS)
    rules, cache_dir, log = make_rules(), tmp_path / "cache", tmp_path / "log"
    clean = prepare(manifest, rules, tmp_path / "clean").dataset()
    context = multiprocessing.get_context("fork")
    moments = random.Random(0)
    killed = set()
    for number in range(ROUNDS):
        encoded = log.stat().st_size if log.exists() else 0
        processes = [context.Process(target=prepare, args=(manifest, rules, cache_dir, log)) for _ in range(2)]
        for process in processes:
            process.start()
        if number % 4 == 0:  # the others are killed at any time of their start, on a busy machine before they encode
            wait_until_it_grows(log, encoded, processes)
        for process in processes:
            time.sleep(moments.uniform(0, 0.2))
            process.kill()  # nothing where it has ended: the last rounds may find little left to encode
            process.join()
            if process.exitcode == -signal.SIGKILL:
                killed.add(process.pid)

    finished = context.Process(target=prepare, args=(manifest, rules, cache_dir, log))
    finished.start()
    finished.join()
    assert finished.exitcode == 0

    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({process for process, _ in calls}) > 2, "the kills came too early to test anything"
    last_call_of = {process: index for index, (process, _) in enumerate(calls)}
    seen: dict[float, int] = {}
    for index, (_, clips) in enumerate(calls):
        for clip in clips:
            if clip in seen:
                before = calls[seen[clip]][0]
                assert before in killed
                assert last_call_of[before] == seen[clip], "a clip was encoded again that was not in flight"
            seen[clip] = index
    assert len(seen) == CLIPS
    found = prepare(manifest, rules, cache_dir).dataset()
    assert all(torch.equal(first, second) for first, second in zip(codes_of(found), codes_of(clean), strict=True))
