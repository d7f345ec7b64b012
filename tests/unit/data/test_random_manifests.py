"""Random manifests through the command line's own function: it does its work, or says what is wrong; status 2."""

import pytest

from tests.support.in_process import status_of
from tests.support.wild_manifests import wild_manifest, write_audio


def check(seeds, tiny_base, folder, capsys):
    audio = write_audio(folder)
    common = [f"--base_ckpt={tiny_base}", f"--data.cache_dir={folder / 'cache'}", f"--output_dir={folder / 'run'}"]
    statuses = {}
    for seed in seeds[::2]:  # two at a time, in half the time
        train, flags = wild_manifest(seed, folder, audio)
        val, _ = wild_manifest(seed + 1, folder, audio)
        statuses[seed] = status_of(["validate", f"--train_manifest={train}", f"--val_manifest={val}", *common, *flags])
        capsys.readouterr()
        train.unlink()
        val.unlink()
    assert {seed: status for seed, status in statuses.items() if status not in (0, 2)} == {}
    assert set(statuses.values()) == {0, 2}, "both ends are to be seen"


def test_wild_manifests_end_well_or_with_status_2(tiny_base, tmp_path, capsys):
    check(range(60), tiny_base, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 5100, 1000))
def test_5000_wild_manifests(first, tiny_base, tmp_path, capsys):
    check(range(first, first + 1000), tiny_base, tmp_path, capsys)
