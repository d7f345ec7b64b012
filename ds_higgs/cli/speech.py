"""The commands of after the training: export, generate, evaluate, report."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_higgs.cli.arguments import count, count_or_zero, numbers, positive_or_zero, seconds, two_names
from ds_higgs.cli.speaking import add_place_flags, add_sampling_flags, speech_options
from ds_higgs.errors import UserError
from ds_higgs.job.answers import print_answer
from ds_higgs.job.preflight import check_file_writable, check_folder_writable

if TYPE_CHECKING:
    from ds_higgs.data.prompt_forms import PromptForm, ReferenceTurn

AddCommand = Callable[..., argparse.ArgumentParser]

# --reference-turn as data.prompt_form and data.reference_turn.
TURNS: dict[str | None, tuple["PromptForm | None", "ReferenceTurn | None"]] = {
    None: (None, None),
    "user": ("as_is", "as_is"),
    "assistant": ("as_is", "assistant"),
    "boson": ("boson", None),
}
# Flags that are as in the run where they are not given, beside those of the prompt.
_READ_AS_THE_RUN = ("on_bad_sample", "max_audio_s", "cache_dir")


def add_commands(add_command: AddCommand) -> None:
    """Add the commands with `add_command(name, function, summary)`, which returns the command's parser."""
    export = add_command("export", _export, "write a run's adapter, or the model merged with it")
    export.add_argument("source", type=Path, metavar="RUN", help="a run's folder, a checkpoint of it, or an adapter")
    export.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="new folder to write")
    export.add_argument("--step", type=count_or_zero, help="the adapter of this step (the final or a newer one)")
    export.add_argument("--merge", action="store_true", help="the whole model rather than the adapter")
    export.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the merged model (bf16)")
    export.add_argument(
        "--format",
        choices=("original", "transformers"),
        default="original",
        help="boson_multimodal's own names, or those of transformers >= 5.3 (original)",
    )
    export.add_argument("--base", help="base checkpoint, where the one that the adapter names is elsewhere now")
    _add_scale_flag(export)
    export.add_argument("--licence", default="other", help="for the model card (other: the base's)")
    export.add_argument(
        "--licence-file", type=Path, nargs="+", default=[], help="to put beside those in the base's folder"
    )
    export.add_argument("--push", metavar="OWNER/NAME", help="send it to this repository of the hub")
    export.add_argument("--private", action="store_true", help="with --push: a repository that only you see")

    generate = add_command("generate", _generate, "speak a text, or a manifest's samples, to WAV files")
    _add_model_flags(generate)
    generate.add_argument("--adapter", type=Path, help="a run's folder, a checkpoint of it, or an adapter")
    _add_scale_flag(generate)
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="the text to speak")
    what.add_argument("--manifest", type=Path, help="speak the samples of this manifest")
    generate.add_argument("-o", "--out", type=Path, required=True, help="WAV file; a folder with --manifest")
    _add_reference_flags(generate)
    _add_speech_flags(generate, count_help="with --manifest: speak at most so many samples, spread over it (all)")

    evaluate = add_command("evaluate", _evaluate, "losses and speech of checkpoints against their base, in one table")
    _add_evaluate_flags(evaluate)

    report = add_command("report", _report, "one HTML page of a run, or of several side by side")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    report.add_argument("-o", "--out", type=Path, help="the page (report.html or blind.html in the first run's folder)")
    report.add_argument("--blind", action="store_true", help="two of its evaluated models, without names, to vote on")
    report.add_argument("--columns", type=two_names, metavar="A,B", help="with --blind: which (the first, the last)")


def _add_evaluate_flags(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("sources", type=Path, nargs="*", metavar="RUN", help="runs, checkpoints or adapters")
    _add_model_flags(evaluate)
    scale = evaluate.add_mutually_exclusive_group()
    _add_scale_flag(scale)
    scale.add_argument(
        "--sweep-scale", type=numbers, metavar="S,S,...", help="a column for each of these shares of the adapter"
    )
    evaluate.add_argument("--manifest", type=Path, help="samples to evaluate on (the run's validation manifest)")
    evaluate.add_argument(
        "--keep", type=Path, metavar="MANIFEST", help="what is to stay as it was (other voices, text): losses on it too"
    )
    evaluate.add_argument("-o", "--out", type=Path, help="folder for WAVs and evaluation.json (RUN/evaluation)")
    evaluate.add_argument(
        "--all-steps",
        action="store_true",
        help="every adapter that the run has kept, with intervals, and which to take",
    )
    evaluate.add_argument("--by", metavar="MEASURE", help="with --all-steps: take the best by this, such as loss")
    evaluate.add_argument("--no-base", action="store_true", help="leave the base without adapter out")
    evaluate.add_argument("--batch-size", type=count, default=4, help="for the losses (4)")
    evaluate.add_argument("--asr", metavar="MODEL", help="speech recogniser of transformers, for error rates")
    evaluate.add_argument("--asr-language", metavar="NAME", help="for a multilingual Whisper model, such as arabic")
    evaluate.add_argument("--speaker-model", metavar="MODEL", help="x-vector model of transformers, for similarity")
    _add_speech_flags(evaluate, count_help="speak at most so many samples, spread over the manifest (8)")


def _add_reference_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", type=Path, metavar="AUDIO", help="recording of the voice to speak in")
    parser.add_argument("--reference-text", metavar="TEXT", help="what is said in it")
    parser.add_argument(
        "--reference-turn",
        choices=[turn for turn in TURNS if turn],
        help="where the reference stands: in the request, as in examples/voice_cloning; in an assistant turn before "
        "it, as data.reference_turn: assistant trains it; or as --prompt-form boson has it (as the run was trained)",
    )
    parser.add_argument(
        "--cfg-scale",
        type=positive_or_zero,
        default=1.0,
        help="with --reference: above 1 is nearer to its voice, against a prompt without it, at twice the time; for "
        "models trained with data.drop_reference (1)",
    )


def _add_scale_flag(parser: "argparse._ActionsContainer") -> None:
    parser.add_argument(
        "--lora-scale", type=positive_or_zero, default=1.0, help="how much of the adapter: 0 is the base (1)"
    )


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-form",
        choices=("as_is", "boson"),
        help="how speech is asked for: as in examples/voice_cloning, or as servers do (as the run was trained; a "
        "base alone: as servers do)",
    )
    parser.add_argument("--base", help="base checkpoint, folder or hub id (the one that the adapter names)")
    parser.add_argument(
        "--step", type=count_or_zero, help="of a run: the adapter of this step (the final or a newer one)"
    )
    add_place_flags(parser)


def _add_speech_flags(parser: argparse.ArgumentParser, *, count_help: str) -> None:
    parser.add_argument("--count", type=count, help=count_help)
    add_sampling_flags(parser)
    parser.add_argument("--cache-dir", type=Path, help="code cache (the run's, else the user's)")
    parser.add_argument(
        "--on-bad-sample", choices=("error", "skip"), help="at a sample of a manifest that cannot be used (as the run)"
    )
    parser.add_argument("--max-audio-s", type=seconds, help="longest audio clip of a manifest, in seconds (as the run)")


def _export(arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.export import Publishing, export

    for file in arguments.licence_file:
        if not file.is_file():
            raise UserError(f"--licence-file: {file}: no such file")
    check_folder_writable(arguments.out, "--out")
    export(
        arguments.source,
        arguments.out,
        step=arguments.step,
        merge=arguments.merge,
        precision=arguments.precision,
        layout=arguments.format,
        base=arguments.base,
        licence=arguments.licence,
        lora_scale=arguments.lora_scale,
        publish=Publishing(arguments.push, arguments.private, tuple(arguments.licence_file)),
    )
    kind = "merged model" if arguments.merge else "adapter"
    print_answer(f"{arguments.out}: {kind} in the {arguments.format} format; README.md tells how to use it")
    if arguments.push:
        print_answer(f"on the hub: {arguments.push}")
    if arguments.format == "transformers" and not arguments.merge:
        print_answer("vLLM-Omni ignores adapters that are not merged: for it, export with --merge")


def _generate(arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.generate import Reference, VoiceOptions, load_voice, speak_manifest, speak_text

    if arguments.manifest is not None and (arguments.reference or arguments.reference_text):
        raise UserError("--reference and --reference-text go with --text: a manifest brings its own references")
    if arguments.cfg_scale != 1 and arguments.reference is None:
        raise UserError("--cfg-scale goes with --text and --reference: it compares with a prompt without reference")
    _check_speech_out(arguments.out, is_folder=arguments.manifest is not None)
    form, turn = TURNS[arguments.reference_turn]
    options = VoiceOptions(
        base=arguments.base,
        revision=arguments.revision,
        adapter=arguments.adapter,
        step=arguments.step,
        lora_scale=arguments.lora_scale,
        codec=arguments.codec,
        device=arguments.device,
        precision=arguments.precision,
        prompt_form=arguments.prompt_form or form,
        reference_turn=turn,
        on_bad_sample=arguments.on_bad_sample,
        max_audio_s=arguments.max_audio_s,
        cache_dir=arguments.cache_dir,
    )
    speech = replace(speech_options(arguments), cfg_scale=arguments.cfg_scale)
    voice, _ = load_voice(options)
    if arguments.manifest is not None:
        rows = speak_manifest(
            arguments.manifest,
            arguments.out,
            voice=voice,
            speech=speech,
            count=arguments.count,
        )
        stopped = sum(row["stopped_by"] == "eos" for row in rows)
        print_answer(f"{arguments.out}: {len(rows)} WAV files, {stopped} ended by the model; measures in samples.jsonl")
        return
    reference = Reference(arguments.reference, arguments.reference_text)
    spoken = speak_text(arguments.text, arguments.out, voice=voice, reference=reference, speech=speech)
    seconds = spoken.codes.shape[1] * voice.codec.hop_length / voice.codec.sampling_rate
    ended = "ended by the model" if spoken.stopped_by == "eos" else "cut off at --max-seconds: the model did not end"
    print_answer(f"{arguments.out}: {seconds:.2f} s, {ended}")


def _check_all_steps(arguments: argparse.Namespace) -> None:
    """Raises UserError for what does not go with --all-steps, or without it."""
    from ds_higgs.commands.choosing import CAN_CHOOSE

    if not arguments.all_steps:
        if arguments.by is not None:
            raise UserError("--by goes with --all-steps")
        return
    if len(arguments.sources) != 1:
        raise UserError(f"--all-steps: expected one run, found {len(arguments.sources)}")
    others = {"--step": arguments.step, "--sweep-scale": arguments.sweep_scale}
    others["--lora-scale"] = None if arguments.lora_scale == 1 else arguments.lora_scale
    if given := [name for name, value in others.items() if value is not None]:
        raise UserError(f"--all-steps: takes every adapter as it was trained; expected it without {given[0]}")
    if arguments.by is not None and arguments.by not in CAN_CHOOSE:
        raise UserError(f"--by: found {arguments.by!r}, expected one of {', '.join(CAN_CHOOSE)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from ds_higgs.commands.evaluate import build_columns, compare, describe_endings, format_table
    from ds_higgs.speech.judging import Judges

    if arguments.keep is not None and arguments.no_base:
        raise UserError("--keep compares with the base; expected it without --no-base")
    _check_all_steps(arguments)
    options = {
        name: getattr(arguments, name)
        for name in ("revision", "codec", "device", "precision", "prompt_form", *_READ_AS_THE_RUN)
    }
    columns = build_columns(
        arguments.sources,
        base=arguments.base,
        step=arguments.step,
        with_base=not arguments.no_base,
        scales=arguments.sweep_scale or (arguments.lora_scale,),
        **options,
    )
    out = arguments.out or _inside_run(arguments.sources, "evaluation", flag="--out")
    check_folder_writable(out, "--out")
    judges = Judges.of(
        arguments.asr,
        arguments.speaker_model,
        language=arguments.asr_language,
        device=arguments.device or "cpu",
    )
    task: dict[str, Any] = {
        "speech": speech_options(arguments),
        "count": 8 if arguments.count is None else arguments.count,
        "batch_size": arguments.batch_size,
        "judges": judges,
        "keep": arguments.keep,
    }
    manifest = arguments.manifest or _val_manifest(arguments.sources)
    if arguments.all_steps:
        _evaluate_all_steps(arguments, {"manifest": manifest, "out": out, **task}, options)
        return
    evaluations = compare(columns, manifest, out, **task)
    format_table(evaluations)
    print_answer("\n".join(["", *describe_endings(evaluations), f"{out}: WAV files and evaluation.json"]))


def _evaluate_all_steps(arguments: argparse.Namespace, task: dict[str, Any], options: dict[str, Any]) -> None:
    from ds_higgs.commands.all_steps import Task, compare_all_steps
    from ds_higgs.commands.choosing import describe_choice, format_columns
    from ds_higgs.commands.generate import VoiceOptions
    from ds_higgs.run_folder import RunFolder

    voice = VoiceOptions(base=arguments.base, read_as=arguments.sources[0], **options)
    columns, choice = compare_all_steps(
        RunFolder.open(arguments.sources[0]), Task(voice, **task), with_base=not arguments.no_base, by=arguments.by
    )
    format_columns(columns)
    print_answer("\n".join(["", *describe_choice(choice), f"{task['out']}: WAV files and evaluation.json"]))


def _report(arguments: argparse.Namespace) -> None:
    from ds_higgs.report import build_blind_test, build_report

    if arguments.columns and not arguments.blind:
        raise UserError("--columns goes with --blind")
    if arguments.blind and len(arguments.runs) > 1:
        raise UserError("--blind: expected one run, whose evaluation has what is compared")
    out = arguments.out or arguments.runs[0] / ("blind.html" if arguments.blind else "report.html")
    check_file_writable(out, "--out")
    if arguments.blind:
        num_pairs = build_blind_test(arguments.runs[0], out, columns=arguments.columns)
        print_answer(f"{out}: {num_pairs} pairs, open it in a browser")
        return
    build_report(arguments.runs, out)
    print_answer(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")


def _check_speech_out(out: Path, *, is_folder: bool) -> None:
    """Refuse, before the model is loaded, what the speech could not be written to."""
    if is_folder:
        check_folder_writable(out, "--out")
        return
    if out.suffix.lower() != ".wav":
        raise UserError(f"--out: {out}: speech is written as WAV; expected a name that ends with .wav")
    check_file_writable(out, "--out")


def _val_manifest(sources: list[Path]) -> Path:
    from ds_higgs.run_folder import RunFolder

    if len(sources) == 1 and (sources[0] / "config.yaml").is_file():
        found = RunFolder.open(sources[0]).config.data.val_sources
        if len(found) == 1:
            return found[0].manifest
        if found:
            names = ", ".join(str(source.manifest) for source in found)
            raise UserError(f"the run has several validation manifests: name one with --manifest ({names})")
    raise UserError("nothing to evaluate on: expected --manifest, or one run that has a validation manifest")


def _inside_run(sources: list[Path], name: str, *, flag: str) -> Path:
    if len(sources) == 1 and (sources[0] / "config.yaml").is_file():
        return sources[0] / name
    raise UserError(f"nowhere to write: expected {flag}, or one run's folder")
