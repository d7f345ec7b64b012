"""Fixtures that all tests share, and what keeps one test from changing another."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process_state import describe_changes, own_random_numbers, read_process_state, seed_generators

# Module and session fixtures that take seconds: tests of one of them run in one process, which makes it once.
COSTLY_FIXTURES = (
    "plain_run",
    "whole_run",
    "heard",
    "place",
    "run",
    "higgs_folder",
    "mixed_dataset",
    "mixed_run",
    "overfitted",
    "whisper_base",
    "simulated",
)
# Left out of the quick form: what starts processes, and what is slow in itself.
NOT_FAST = ("integration", "faults", "native", "gpu_free")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="unit tests without the costly ones")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        slow = [item for item in items if _is_costly(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    for item in items:
        for name in COSTLY_FIXTURES:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {name}"))


def pytest_collection_finish() -> None:
    """Set what has been imported and collected aside: every loading of a model looks for garbage, hundreds of times."""
    gc.collect()
    gc.freeze()


def _is_costly(item: pytest.Item) -> bool:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return folder in NOT_FAST or item.get_closest_marker("costly") is not None


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


@pytest.fixture
def example_flags(tiny_base, example_dir, tmp_path) -> list[str]:
    """A run of the example, with a cache of its own."""
    return [
        f"--train_manifest={example_dir / 'train.json'}",
        f"--val_manifest={example_dir / 'val.json'}",
        f"--base_ckpt={tiny_base}",
        f"--output_dir={tmp_path / 'run'}",
        f"--data.cache_dir={tmp_path / 'cache'}",
    ]
