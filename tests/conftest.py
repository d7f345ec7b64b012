"""Fixtures that all tests share, and what keeps one test from changing another."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process_state import describe_changes, own_random_numbers, read_process_state, seed_generators


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers for a test, whichever ran before it in this process."""
    seed_generators()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Iterator[None]:
    """The same random numbers for a fixture that tests share, whichever of them asks first."""
    if fixturedef.scope == "function":
        return (yield)
    with own_random_numbers():
        return (yield)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = read_process_state()
    yield
    changes = describe_changes(before, read_process_state())
    assert not changes, "the test changed what others share: " + "; ".join(changes)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base checkpoint with its codec; read only."""
    from ds_higgs.model.tiny import write_tiny_base

    folder = tmp_path_factory.mktemp("tiny") / "base"
    write_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def example_dir() -> Path:
    """The voice-cloning example: manifests, audio, config; read only."""
    return Path(__file__).parents[1] / "examples" / "voice_cloning"
