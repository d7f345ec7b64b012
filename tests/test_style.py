"""Style and types, beside the other tests so that they need no time of their own."""

import shutil

import pytest

from tests.support import launching

MAX_SUBJECT = 60
RULED_SINCE = "40f69ab"


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_nothing_to_complain_about(command):
    program, *arguments = command.split()
    assert shutil.which(program, path=launching.free_environment()["PATH"]), f"{program} is part of the dev extra"
    done = launching.run([program, *arguments])
    assert done.returncode == 0, done.stdout


def test_commit_subjects_fit():
    """Of the commits since the rule; a copy without history has none to check."""
    asked = ["git", "-C", str(launching.ROOT), "log", "--format=%h %s", f"{RULED_SINCE}..HEAD"]
    if not (launching.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = launching.run(asked)
    if done.returncode != 0:
        pytest.skip("the checkout does not go back that far")
    long = [line for line in done.stdout.splitlines() if len(line.partition(" ")[2]) > MAX_SUBJECT]
    assert not long
