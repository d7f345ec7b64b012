"""Style and types, beside the other tests so that they need no time of their own."""

import shutil

import pytest

from tests.support import launching


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_nothing_to_complain_about(command):
    program, *arguments = command.split()
    assert shutil.which(program, path=launching.free_environment()["PATH"]), f"{program} is part of the dev extra"
    done = launching.run([program, *arguments])
    assert done.returncode == 0, done.stdout
