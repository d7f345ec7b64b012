"""What cannot be written or imported is found before any work is done, and looking leaves nothing behind."""

import os
from pathlib import Path

import pytest

from ds_higgs.errors import UserError
from ds_higgs.job.preflight import (
    TRACKER_PACKAGES,
    check_file_writable,
    check_folder_writable,
    check_trackers,
    is_installed,
)


def test_a_folder_that_is_there_or_can_be_made(tmp_path):
    check_folder_writable(tmp_path, "run.output_dir")
    check_folder_writable(tmp_path / "a" / "b", "run.output_dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "run.output_dir: found the file .*file, expected a folder"),
        ("file/a/b", "run.output_dir: found the file .*file, expected a folder .*a/b"),
        ("/proc/absent", "run.output_dir: /proc/absent cannot be written"),
        ("x" * 300, "run.output_dir: .* cannot be written: File name too long"),
        ("a\0b", "run.output_dir: .* cannot be written: embedded null byte"),
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        check_folder_writable(tmp_path / path, "run.output_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_of_somebody_else(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        check_folder_writable(tmp_path / "run", "run.output_dir")


def test_files(tmp_path):
    check_file_writable(tmp_path / "absent" / "x.json", "--output")
    check_file_writable(Path(os.devnull), "--output")
    for path in (tmp_path, tmp_path / ("x" * 300), Path(os.devnull, "x"), tmp_path / "a\0b"):
        with pytest.raises(UserError, match="--output: "):
            check_file_writable(path, "--output")


def test_a_tracker_needs_its_package(tmp_path, monkeypatch):
    sections = {"tensorboard": {"enabled": True}, "wandb": {"enabled": False}, "comet": {"project": "x"}}
    check_trackers(sections)
    (tmp_path / "absent_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("absent_package")
    monkeypatch.setitem(TRACKER_PACKAGES, "comet", "absent_package")
    with pytest.raises(UserError, match=r"comet: the package absent_package is not installed \(pip install absent"):
        check_trackers({**sections, "comet": {"enabled": True}})
