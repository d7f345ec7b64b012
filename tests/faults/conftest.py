"""The undisturbed run that disturbed ones are compared with."""

import pytest

from tests.faults.job import write_config
from tests.faults.scenarios import run_to_the_end


@pytest.fixture(scope="session")
def faults_folder(tmp_path_factory):
    """One folder for all runs, so that they share the cache of codes."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def undisturbed(faults_folder, tiny_base):
    """The result of the short forms' run when nothing happens to it."""
    return run_to_the_end(write_config(faults_folder / "undisturbed", tiny_base, run={"max_steps": 10}))
