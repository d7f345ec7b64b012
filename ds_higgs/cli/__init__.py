"""The command line: parses, imports lazily, calls one function."""

from ds_higgs.cli.main import entry_point, main

__all__ = ["entry_point", "main"]
