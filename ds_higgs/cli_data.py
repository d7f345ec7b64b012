"""The commands of before the training: manifest, validate, prepare."""

import argparse
from collections.abc import Callable

from ds_higgs.config import Config

AddCommand = Callable[..., argparse.ArgumentParser]


def add_commands(add_command: AddCommand, add_config_command: AddCommand) -> None:
    """Add the commands with `add_command(name, function, summary)`, which returns the command's parser."""
    validate = add_config_command("validate", _validate, "check manifests, audio, base checkpoint and codec")
    validate.add_argument("--json", action="store_true", help="the report as JSON on standard output")

    prepare = add_config_command("prepare", _prepare, "encode the manifests' audio into the code cache")
    prepare.add_argument(
        "--processes", type=int, metavar="N", help="processes that encode at once (one per GPU; 1 without)"
    )


def _validate(config: Config, arguments: argparse.Namespace) -> None:
    from ds_higgs.validate import validate

    validate(config, as_json=arguments.json)


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    from ds_higgs.prepare import prepare

    prepare(config, processes=arguments.processes)
