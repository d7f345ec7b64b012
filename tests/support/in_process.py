"""The command line's own function in this process, and an environment that lacks a package."""

import builtins
from collections.abc import Sequence

import pytest

from ds_higgs.cli.main import main


def status_of(arguments: Sequence[str]) -> int | str:
    """The exit status, or what came instead."""
    try:
        return main(arguments)
    except SystemExit as end:  # argparse's
        return end.code or 0
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail_imports(monkeypatch: pytest.MonkeyPatch, *, of: str, lacking: str) -> None:
    """Let every import of `of`, or from below it, fail because the module `lacking` is not installed."""
    real_import = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith(of):
            raise ModuleNotFoundError(f"No module named '{lacking}'", name=lacking)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
