"""The command `rehearse`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ds_higgs.cli.speaking import add_place_flags, add_sampling_flags, speech_options
from ds_higgs.job.answers import print_answer
from ds_higgs.job.preflight import check_folder_writable

AddCommand = Callable[..., argparse.ArgumentParser]


def add_commands(add_command: AddCommand) -> None:
    """Add the command with `add_command(name, function, summary)`, which returns its parser."""
    rehearse = add_command("rehearse", _rehearse, "let the base speak texts in voices of its own, to train on beside")
    rehearse.add_argument("--base", required=True, help="base checkpoint, folder or hub id")
    rehearse.add_argument("--texts", type=Path, required=True, metavar="FILE", help="a text a line, UTF-8")
    rehearse.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="new folder; replay.jsonl in it")
    rehearse.add_argument(
        "--prompt-form", choices=("as_is", "boson"), default="boson", help="how speech is asked for (boson)"
    )
    add_place_flags(rehearse)
    add_sampling_flags(rehearse)
    rehearse.add_argument("--cache-dir", type=Path, help="code cache of the training (the user's)")


def _rehearse(arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.generate import VoiceOptions, load_voice
    from ds_higgs.commands.rehearse import read_texts, rehearse

    texts = read_texts(arguments.texts)
    check_folder_writable(arguments.out, "--out")
    options = VoiceOptions(
        base=arguments.base,
        revision=arguments.revision,
        codec=arguments.codec,
        device=arguments.device,
        precision=arguments.precision,
        prompt_form=arguments.prompt_form,
        cache_dir=arguments.cache_dir,
    )
    voice, _ = load_voice(options)
    found = rehearse(texts, arguments.out, voice=voice, speech=speech_options(arguments), base=arguments.base)
    left_out = len(texts) - found.num_spoken
    print_answer(f"{found.manifest}: {found.num_spoken} samples, {found.hours:.2f} h ({left_out} texts left out)")
