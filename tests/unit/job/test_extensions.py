"""A lock file of a killed process does not stop the next start; one of a living process stays."""

import subprocess
import sys

from ds_higgs.job.extensions import loading_extensions
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
        "import time; from pathlib import Path; from ds_higgs.extensions import loading_extensions\n"
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
