"""Fixtures that all tests share."""

from pathlib import Path

import pytest


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
