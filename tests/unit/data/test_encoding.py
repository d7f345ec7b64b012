"""Encoding is asked to stop, and tells how far it is, clip by clip: with a real codec a unit can take many minutes."""

import multiprocessing
import shutil
from dataclasses import replace

import pytest

from ds_higgs.data.build import Preparation
from ds_higgs.data.cache import CodeCache, codes_folder
from ds_higgs.data.distinct_clips import DistinctClips
from ds_higgs.data.encoding import Encoder, plan_units
from ds_higgs.files import NumberLocks
from tests.support.patience import HANG_S


@pytest.fixture
def clips(mixed_manifest, make_rules, tmp_path):
    preparation = Preparation(mixed_manifest, rules=make_rules(), cache_dir=tmp_path)
    preparation.analyse()
    return DistinctClips(preparation.samples)


@pytest.fixture
def make_encoder(mixed_manifest, clips, codec_source, tmp_path):
    """Encoders into one cache; keyword arguments as of Encoder."""

    def make(**options):
        cache = CodeCache(tmp_path, codec_source.identity)
        cache.scan()
        return Encoder(cache, mixed_manifest, clips, codec_source.load, rate=codec_source.sampling_rate, **options)

    return make


@pytest.fixture
def units(clips):
    return plan_units(clips)


def test_a_stop_is_heard_between_the_clips_of_a_unit_and_loses_none(make_encoder, units):
    [unit] = units
    asked = []
    stopped = make_encoder(stop=lambda: bool(asked.append(1)) or len(asked) > 3)
    stopped.encode_all(units)
    assert stopped.num_encoded == 2 < len(unit.clips)
    rest = make_encoder()
    rest.encode_all(units)
    assert rest.num_encoded == len(unit.clips) - 2


def test_progress_is_told_by_the_clip(make_encoder, units):
    told = []
    make_encoder(progress=lambda done, missing: told.append((done, missing))).encode_all(units)
    count = len(units[0].clips)
    assert list(dict.fromkeys(told)) == [(done, count) for done in range(count + 1)]


def test_codes_of_before_the_semantic_model_was_recorded_are_named(mixed_manifest, make_rules, tmp_path, caplog):
    rules = make_rules()
    rules = replace(rules, codec=replace(rules.codec, former_identity="0" * 64))
    folder = codes_folder(tmp_path, "0" * 64)
    for exists in (False, True):
        if exists:
            folder.mkdir(parents=True)
            shutil.rmtree(codes_folder(tmp_path, rules.codec.identity))
        preparation = Preparation(mixed_manifest, rules=rules, cache_dir=tmp_path)
        preparation.analyse()
        preparation.encode(devices=["cpu"])
        assert (f"{folder}: codes of an earlier version" in caplog.text) == exists


def hold(path, number, held, free):
    with NumberLocks(path).hold(number):
        held.set()
        free.wait(HANG_S)


def test_a_stop_is_heard_while_another_process_is_at_the_last_unit(make_encoder, units, codec_source, tmp_path):
    context = multiprocessing.get_context("fork")
    held, free = context.Event(), context.Event()
    locks = CodeCache(tmp_path, codec_source.identity).folder / "units.lock"
    other = context.Process(target=hold, args=(locks, units[0].number, held, free))
    other.start()
    held.wait(HANG_S)
    asked = []
    encoder = make_encoder(stop=lambda: bool(asked.append(1)) or len(asked) > 3)
    encoder.encode_all(units)
    assert other.is_alive()
    assert encoder.num_encoded == 0
    free.set()
    other.join()
