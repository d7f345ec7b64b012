"""The command line: parses, imports lazily, calls one function."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ds_higgs import __version__
from ds_higgs.cli.arguments import card_gib, count, positive, seed
from ds_higgs.cli.data import add_commands as add_data_commands
from ds_higgs.cli.keys import describe_keys
from ds_higgs.cli.rehearse import add_commands as add_rehearse_command
from ds_higgs.cli.speech import add_commands as add_speech_commands
from ds_higgs.config import Config
from ds_higgs.config.file import SHORT_FLAGS, known_keys, load_config, nearest_key, parse_value
from ds_higgs.errors import UserError
from ds_higgs.job.answers import keep_for_answers, print_answer
from ds_higgs.job.logs import VERBOSE, set_up_logging
from ds_higgs.job.lossy_output import lossy_output
from ds_higgs.job.preflight import check_file_writable, check_folder_writable, explain_missing
from ds_higgs.job.process_exit import run_and_exit

Command = Callable[[argparse.Namespace, list[str]], None]


def entry_point() -> NoReturn:
    """Run the command line and exit: 0 done, 2 the user's input is wrong, 1 (with a traceback) anything else."""
    with lossy_output():
        run_and_exit(partial(main, sys.argv[1:], prepare=_own_the_process))


def main(arguments: Sequence[str], *, prepare: Callable[[], None] = lambda: None) -> int:
    """Run one command; its exit status, where no error is raised that is not the user's.

    Args:
        prepare: called once the arguments are understood, before the command.
    """
    try:
        _run_complete(arguments, prepare)
    except UserError as error:
        # Ranks find the same mistake: the first of each machine tells it whole.
        rank = int(os.environ.get("LOCAL_RANK", "-1"))
        message = str(error) if rank <= 0 else f"[local rank {rank}] {str(error).splitlines()[0]}"
        # An argument that is no UTF-8 comes with surrogates, which not every stream takes.
        message = message.encode(errors="backslashreplace").decode()
        print(f"ds-higgs: {message}", file=sys.stderr, flush=True)
        return 2
    return 0


def _own_the_process() -> None:
    """Standard output is for the answer, standard error for what is logged."""
    keep_for_answers()
    ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    set_up_logging(*ranks)


def _run_complete(arguments: Sequence[str], prepare: Callable[[], None]) -> None:
    """`run`, where packages that no dependency can bring may be missing."""
    try:
        run(arguments, prepare)
    except ModuleNotFoundError as error:
        raise explain_missing(error) or error from None


def run(arguments: Sequence[str], prepare: Callable[[], None] = lambda: None) -> None:
    """Run one command.

    Raises:
        UserError: for what the user has to mend.
    """
    parsed, rest = build_parser().parse_known_args(arguments)
    if parsed.verbose:
        os.environ[VERBOSE] = "1"
    prepare()
    command: Command = parsed.command
    command(parsed, rest)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-higgs",
        description="Fine-tune Higgs Audio v2 with LoRA on DeepSpeed.",
        epilog="ds-higgs COMMAND --help tells more. Exit status: 0 done; 2 wrong input; 1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"ds_higgs {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_config_command(commands, "train", _train, "train a LoRA adapter; resumes a stopped run by itself")
    zero_config = _add_config_command(commands, "zero-config", _zero_config, "the DeepSpeed JSON that train would use")
    zero_config.add_argument("-o", "--output", type=Path, help="write to this file rather than the screen")

    estimate = _add_config_command(commands, "estimate", _estimate, "memory per GPU, term by term, before loading")
    estimate.add_argument("--world-size", type=count, default=1, help="GPUs in all (1)")
    estimate.add_argument("--positions", type=count, default=500, help="tokens and frames of a sample (500)")
    estimate.add_argument(
        "--card-gib", type=card_gib, nargs="+", default=[16, 24, 48, 80, 141], help="cards to fill (16 24 48 80 141)"
    )

    tune = _add_config_command(commands, "tune", _tune, "short trials over batch and ZeRO settings; the best config")
    tune.add_argument("--num-gpus", type=count, default=None, help="processes of a trial (all GPUs; 2 without any)")
    tune.add_argument("--steps", type=count, default=6, help="counted steps of a trial, after 2 of warm-up (6)")
    tune.add_argument("--max-trials", type=count, default=24, help="trials at most (24)")
    tune.add_argument("--budget-s", type=positive, help="start no trial after this many seconds")
    tune.add_argument("--timeout-s", type=positive, default=900.0, help="end a trial after this many seconds (900)")

    tiny = _add_command(commands, "init-tiny", _init_tiny, "write a tiny base checkpoint, for trying things on a CPU")
    tiny.add_argument("folder", type=Path, metavar="DIR")
    tiny.add_argument("--whisper", action="store_true", help="with a Whisper audio tower")
    tiny.add_argument("--seed", type=seed, default=0, help="of the random weights (0)")

    doctor = _add_config_command(
        commands, "doctor", _doctor, "check this machine, and with -c what a job needs of it; says what to do"
    )
    doctor.add_argument("--json", action="store_true", help="the findings as JSON on standard output")

    def add_plain_command(name: str, function: Callable[[argparse.Namespace], None], summary: str):
        return _add_command(commands, name, partial(_without_rest, function), summary)

    def add_config_command(name: str, function: Callable[[Config, argparse.Namespace], None], summary: str):
        return _add_config_command(commands, name, partial(_with_config, function), summary)

    add_data_commands(add_plain_command, add_config_command)
    add_rehearse_command(add_plain_command)
    add_speech_commands(add_plain_command)
    return parser


def _with_config(
    function: Callable[[Config, argparse.Namespace], None], arguments: argparse.Namespace, rest: list[str]
) -> None:
    function(load_config(arguments.config, parse_overrides(rest)), arguments)


def _without_rest(function: Callable[[argparse.Namespace], None], arguments: argparse.Namespace, rest: list[str]):
    _refuse(rest)
    function(arguments)


def _train(arguments: argparse.Namespace, rest: list[str]) -> None:
    config = load_config(arguments.config, parse_overrides(rest))
    from ds_higgs.training.run import train

    train(config)


def _zero_config(arguments: argparse.Namespace, rest: list[str]) -> None:
    import json

    from ds_higgs.training.zero import build_deepspeed_config

    config = load_config(arguments.config, parse_overrides(rest))
    if config.zero.stage == "auto":
        raise UserError("zero.stage: auto is decided where a run starts; expected a number, as ds-higgs estimate tells")
    text = json.dumps(build_deepspeed_config(config), indent=2)
    if arguments.output is None:
        print_answer(text)
    else:
        check_file_writable(arguments.output, "--output")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> None:
    from ds_higgs.commands.doctor import run_doctor

    named = arguments.config is not None or rest
    config = load_config(arguments.config, parse_overrides(rest)) if named else None
    run_doctor(config, as_json=arguments.json)


def _estimate(arguments: argparse.Namespace, rest: list[str]) -> None:
    config = load_config(arguments.config, parse_overrides(rest))
    from ds_higgs.commands.estimate import run_estimate

    run_estimate(config, world_size=arguments.world_size, positions=arguments.positions, card_gib=arguments.card_gib)


def _tune(arguments: argparse.Namespace, rest: list[str]) -> None:
    config = load_config(arguments.config, parse_overrides(rest))
    import torch

    from ds_higgs.commands.tune import run_tune

    run_tune(
        config,
        num_processes=arguments.num_gpus or torch.cuda.device_count() or 2,
        steps=arguments.steps,
        max_trials=arguments.max_trials,
        budget_s=arguments.budget_s,
        timeout_s=arguments.timeout_s,
    )


def _init_tiny(arguments: argparse.Namespace, rest: list[str]) -> None:
    _refuse(rest)
    from ds_higgs.model.tiny import write_tiny_base

    check_folder_writable(arguments.folder, "DIR")
    write_tiny_base(arguments.folder, seed=arguments.seed, whisper=arguments.whisper)
    print_answer(f"{arguments.folder}: tiny base checkpoint")


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key VALUE`, `--section.key=VALUE` and the short flags, as "section.key" to value.

    Raises:
        UserError: listing every argument that is no flag, has no value or is not known.
    """
    known = {name for name, _, _ in known_keys()}
    overrides: dict[str, Any] = {}
    problems = []
    waiting = list(arguments)
    while waiting:
        flag = waiting.pop(0)
        name, has_value, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            problems.append(f"{flag}: expected a flag such as --optim.learning_rate")
            continue
        if not has_value:
            if not waiting or waiting[0].startswith("--"):
                problems.append(f"{flag}: expected a value after it")
                continue
            value = waiting.pop(0)
        key = SHORT_FLAGS.get(name, name)
        if key in known or key.startswith("zero.extra."):
            try:
                overrides[key] = parse_value(value)
            except UserError as error:
                problems.append(f"{flag}: {error}")
        elif not name.startswith("local_rank") and not name.startswith("local-rank"):  # the launcher's own flag
            near = nearest_key(key)
            problems.append(f"{flag}: unknown flag" + (f"; did you mean --{near}?" if near else ""))
    if problems:
        raise UserError.from_problems("the command line is wrong", problems)
    return overrides


def _add_command(
    commands: Any, name: str, command: Command, summary: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--verbose", action="store_true", help="show also what the libraries have to say")
    parser.set_defaults(command=command)
    return parser


def _add_config_command(commands: Any, name: str, command: Command, summary: str) -> argparse.ArgumentParser:
    """A command that takes a configuration file, every key as a flag, and the short flags."""
    parser = _add_command(commands, name, command, summary, epilog=describe_keys(name))
    parser.usage = f"ds-higgs {name} [-c CONFIG] [--section.key VALUE ...]"
    parser.add_argument("-c", "--config", type=Path, help="YAML configuration; flags win over it")
    return parser


def _refuse(rest: Sequence[str]) -> None:
    if rest:
        raise UserError(f"unexpected arguments: {' '.join(rest)}")
