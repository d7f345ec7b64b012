"""The commands of before the training: download, init, manifest, validate, prepare."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ds_higgs.cli.arguments import count, device, seed, share, share_of
from ds_higgs.commands.recipes.goals import CARDS, GOALS
from ds_higgs.config import Config
from ds_higgs.data.sources.opening import FORMS
from ds_higgs.errors import UserError
from ds_higgs.hub import HIGGS_TOKENIZER, RELEASED_REPOSITORY
from ds_higgs.job.answers import print_answer
from ds_higgs.job.preflight import check_file_writable, check_folder_writable

AddCommand = Callable[..., argparse.ArgumentParser]


def add_commands(add_command: AddCommand, add_config_command: AddCommand) -> None:
    """Add the commands with `add_command(name, function, summary)`, which returns the command's parser."""
    download = add_command("download", _download, "fetch base checkpoint, tokenizer and codec; resumable")
    download.add_argument("--out", type=Path, metavar="DIR", help="one folder with all of it (the hub's cache)")
    download.add_argument("--base", default=RELEASED_REPOSITORY, help=f"hub id ({RELEASED_REPOSITORY})")
    download.add_argument("--revision", help="of the base (the pinned one of the released base, else the newest)")
    download.add_argument("--codec", help=f"hub id (the base's own where it has one, else {HIGGS_TOKENIZER})")

    init = add_command("init", _init, "write a commented configuration for recordings or a manifest, and this machine")
    init.add_argument("source", type=Path, help="a manifest, or what `ds-higgs manifest` reads: it is then made too")
    init.add_argument("-o", "--out", type=Path, required=True, help="YAML to write; manifests come beside it")
    init.add_argument("--goal", choices=list(GOALS), default="voice", help="what the training is for (voice)")
    init.add_argument("--base", default=RELEASED_REPOSITORY, help=f"folder or hub id ({RELEASED_REPOSITORY})")
    init.add_argument("--card", choices=list(CARDS), help="what it is trained on (this machine)")
    init.add_argument("--val-manifest", type=Path, help="for validation, where SOURCE is a manifest")
    init.add_argument("--split", type=share, default=0.05, help="share of recordings to hold out (0.05)")

    manifest = add_command("manifest", _manifest, "make a manifest from recordings and their texts")
    manifest.add_argument("source", type=Path, help="; ".join(form.summary for form in FORMS))
    manifest.add_argument("-o", "--out", type=Path, required=True, help="manifest to write: .json, or .jsonl for lines")
    forms = [form.name for form in FORMS]
    manifest.add_argument(
        "--form",
        choices=forms,
        metavar="FORM",
        help=f"of the source, where its name does not tell: {', '.join(forms)}",
    )
    manifest.add_argument("--split", type=share, metavar="SHARE", help="share of the utterances to hold out, as 0.05")
    manifest.add_argument("--val-out", type=Path, help="manifest of those held out (OUT with -val)")
    manifest.add_argument("--seed", type=seed, default=0, help="of the references and the split (0)")
    manifest.add_argument("--speaker", help="one speaker for all utterances, whatever the source says")
    manifest.add_argument("--system", help='text of the system message ("" for none)')
    manifest.add_argument(
        "--prompt-form",
        choices=("as_is", "boson"),
        default="as_is",
        help="how the samples ask for speech: as in examples/voice_cloning, or as servers do (as_is)",
    )
    manifest.add_argument(
        "--transcribe", metavar="MODEL", help="speech recogniser of transformers, for recordings without text"
    )
    manifest.add_argument("--language", metavar="NAME", help="for a multilingual Whisper model, such as arabic")
    manifest.add_argument("--device", type=device, default="cpu", help="of the recogniser, such as cuda (cpu)")
    manifest.add_argument("--codec", metavar="CODEC", help=f"whose codes a source of codes has ({HIGGS_TOKENIZER})")
    manifest.add_argument("--trust-codec", action="store_true", help="take its codes for those, without a look")
    manifest.add_argument("--force", action="store_true", help="write over a file that is no manifest of ours")

    validate = add_config_command("validate", _validate, "check manifests, audio, base checkpoint and codec")
    validate.add_argument("--deep", action="store_true", help="verify every byte that is prepared, too")
    validate.add_argument("--json", action="store_true", help="the report as JSON on standard output")

    inspect = add_config_command("inspect", _inspect, "one HTML page of the manifests' samples, doubtful ones first")
    inspect.add_argument("-o", "--out", type=Path, default=Path("inspect.html"), help="the page (inspect.html)")
    inspect.add_argument("--audio-mb", type=count, default=20, help="room for players in the page, in MB (20)")

    _add_prepare(add_config_command)


def _add_prepare(add_config_command: AddCommand) -> None:
    prepare = add_config_command("prepare", _prepare, "encode the manifests' audio into the code cache")
    prepare.add_argument(
        "--processes", type=count, metavar="N", help="processes that encode at once (one per GPU; 1 without)"
    )
    part = prepare.add_mutually_exclusive_group()
    part.add_argument(
        "--share",
        type=share_of,
        metavar="I/N",
        help="encode the I-th of N shares by itself, into files of its own; one on each of many machines",
    )
    part.add_argument(
        "--join",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="check all shares, of data.cache_dir and of the cache folders FOLDER, and make of them what is trained on",
    )


def _download(arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.download import download_all

    if arguments.out is not None:
        check_folder_writable(arguments.out, "--out")
    for line in download_all(arguments.base, revision=arguments.revision, codec=arguments.codec, out=arguments.out):
        print_answer(line)


def _init(arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.init import InitOptions, make_config

    check_file_writable(arguments.out, "--out")
    options = InitOptions(arguments.goal, arguments.base, arguments.card, arguments.val_manifest, share=arguments.split)
    for line in make_config(arguments.source, arguments.out, options):
        print_answer(line)


def _manifest(arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.manifest import Codec, Recogniser, describe_made, make_manifests

    check_file_writable(arguments.out, "--out")
    if arguments.val_out is not None:
        check_file_writable(arguments.val_out, "--val-out")
    if arguments.language is not None and arguments.transcribe is None:
        raise UserError("--language: needs --transcribe")
    made = make_manifests(
        arguments.source,
        arguments.out,
        form=arguments.form,
        share=arguments.split,
        validation=arguments.val_out,
        seed=arguments.seed,
        speaker=arguments.speaker,
        system=arguments.system,
        prompt_form=arguments.prompt_form,
        recogniser=Recogniser(arguments.transcribe, arguments.language, arguments.device)
        if arguments.transcribe
        else None,
        codec=Codec(arguments.codec, trust=arguments.trust_codec),
        force=arguments.force,
    )
    for line in describe_made(arguments.source, made):
        print_answer(line)


def _validate(config: Config, arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.validate import validate

    validate(config, as_json=arguments.json, deep=arguments.deep)


def _inspect(config: Config, arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.inspect import inspect
    from ds_higgs.report.inspection import build_inspection

    check_file_writable(arguments.out, "--out")
    found = inspect(config)
    build_inspection(found, arguments.out, audio_bytes=arguments.audio_mb * 1_000_000)
    doubtful = sum(one.score > 0 for one in found.samples)
    print_answer(
        f"{arguments.out}: {len(found.samples)} samples, {doubtful} with warnings"
        + (f", {len(found.problems)} problems" if found.problems else "")
        + f"; {arguments.out.stat().st_size / 1e6:.1f} MB, open it in a browser"
    )


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    from ds_higgs.commands import prepare
    from ds_higgs.data.shares.dealing import Share

    if arguments.join is not None:
        if arguments.processes is not None:
            raise UserError("--processes: goes with --share or alone; joining encodes nothing")
        prepare.join_shares(config, arguments.join)
    elif arguments.share is not None:
        prepare.prepare_share(config, Share(*arguments.share), processes=arguments.processes)
    else:
        prepare.prepare(config, processes=arguments.processes)
