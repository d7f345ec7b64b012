"""`ds-higgs validate`: checks everything that training reads and reports every problem at once."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_higgs import setup
from ds_higgs.config import Config
from ds_higgs.data.build import Preparation
from ds_higgs.data.problems import Problem
from ds_higgs.data.review.kinds import KINDS, DataWarning
from ds_higgs.data.review.reviewing import review
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.statistics import ManifestStatistics
from ds_higgs.data.variation import check_can_vary
from ds_higgs.errors import UserError
from ds_higgs.job import distributed
from ds_higgs.job.answers import answer_stream, print_answer
from ds_higgs.job.logs import phase
from ds_higgs.job.preflight import check_trackers
from ds_higgs.layout import AudioLayout
from ds_higgs.losses import normalised_codebook_weights
from ds_higgs.model.loading import HiggsAudioModel, check_weights_fit, resolve_base
from ds_higgs.model.signature import check_model_class
from ds_higgs.training.memory_plan import choose_memory_settings
from ds_higgs.training.zero import build_deepspeed_config

Result = TypeVar("Result")
MAX_SPEAKERS = 10
MAX_WARNINGS = 3  # shown of a kind
NO_SAMPLE = -1  # in place of a sample's number


@dataclass
class Report:
    """What was found. `problems` would stop training; `rejected` are samples that it would leave out.

    warnings: what would not stop it and is likely a mistake.
    """

    problems: list[Problem] = field(default_factory=list)
    rejected: list[Problem] = field(default_factory=list)
    warnings: list[DataWarning] = field(default_factory=list)
    statistics: dict[str, ManifestStatistics] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "problems": [_problem_as_json(problem) for problem in self.problems],
            "rejected": [_problem_as_json(problem) for problem in self.rejected],
            "warnings": [asdict(warning) for warning in self.warnings],
            "manifests": {name: asdict(statistics) for name, statistics in self.statistics.items()},
        }


def validate(config: Config, *, as_json: bool = False, deep: bool = False) -> None:
    """Check base checkpoint, model class, codec, manifests and all audio; print the report.

    Args:
        deep: verify every byte of what is prepared.

    Raises:
        UserError: anything would stop training.
    """
    report = collect_report(config, deep=deep)
    if as_json:
        print_answer(json.dumps(report.as_json(), ensure_ascii=False, indent=2))
    else:
        print_report(report)
    if report.problems:
        noun = "problem" if len(report.problems) == 1 else "problems"
        raise UserError(f"{len(report.problems)} {noun} would stop training")


def collect_report(config: Config, *, deep: bool = False) -> Report:
    """Everything that `validate` tells; what depends on something broken is left out."""
    report = Report()

    def attempt(place: str, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except UserError as error:
            report.problems.append(Problem(file=place, number=NO_SAMPLE, sample=place, message=str(error)))
            return None

    attempt("zero.extra", lambda: check_trackers(build_deepspeed_config(config)))
    attempt("run.output_dir", lambda: setup.check_run_folder(config))
    device = distributed.training_device(distributed.read_ranks())
    attempt("memory", lambda: choose_memory_settings(config, device_type=device.type))
    attempt("model", lambda: check_model_class(HiggsAudioModel, allow_fork=config.model.allow_fork))
    base = attempt("model.base", lambda: resolve_base(config.model.base, config.model.revision))
    if base is not None:
        attempt("model.base", lambda: check_weights_fit(base))
    rules = attempt("model.base", lambda: setup.build_sample_rules(config.data, base)) if base is not None else None
    if rules is not None:
        with phase("loading the audio codec"):
            attempt("data.codec", rules.codec.load)
    cache_dir = attempt("data.cache_dir", lambda: _usable_code_cache(config))
    if rules is None:
        return report
    num_codebooks = rules.layout.num_codebooks
    attempt("loss", lambda: normalised_codebook_weights(config.loss.codebook_weights, num_codebooks))
    if cache_dir is None:
        return report
    preparations = [
        attempt(str(manifest), partial(_check_manifest, config, manifest, checked, report, deep=deep))
        for manifest, checked in setup.manifests_with_rules(config.data, rules)
    ]
    if config.data.audio == "elsewhere":
        return report
    with phase("listening to the recordings"):
        report.warnings = _review(preparations, len(config.data.train_sources), rules.layout)
    return report


def _review(preparations: list[Preparation | None], num_training: int, layout: AudioLayout) -> list[DataWarning]:
    """The warnings about those manifests that could be prepared, of which the first ones are for training."""
    training, validation = preparations[:num_training], preparations[num_training:]
    return review([one for one in training if one], [one for one in validation if one], layout).warnings


def print_report(report: Report) -> None:
    """The report as tables on standard output."""
    console = Console(file=answer_stream(), soft_wrap=True)
    for name, statistics in report.statistics.items():
        console.print(_statistics_table(name, statistics))
    for title, problems in (("Problems", report.problems), ("Left out (on_bad_sample: skip)", report.rejected)):
        if problems:
            console.print(_problems_table(title, problems))
    if report.warnings:
        _print_warnings(console, report.warnings)
    if not report.problems:
        console.print("Nothing would stop training.")


def _problem_as_json(problem: Problem) -> dict[str, Any]:
    return asdict(problem) | {"number": None if problem.number == NO_SAMPLE else problem.number}


def _usable_code_cache(config: Config) -> Path:
    setup.check_code_cache(config.data)
    return setup.code_cache_dir(config.data)


def _check_manifest(config: Config, manifest: Path, rules: SampleRules, report: Report, *, deep: bool) -> Preparation:
    preparation = Preparation(manifest, rules=rules, cache_dir=setup.code_cache_dir(config.data))
    with phase(f"checking {manifest.name}"):
        preparation.analyse()
        check_can_vary(str(manifest), preparation.samples, rules)
        preparation.encode()
    statistics = preparation.statistics()
    report.statistics[str(manifest)] = statistics
    stops = config.data.on_bad_sample == "error" or statistics.num_samples == 0
    (report.problems if stops else report.rejected).extend(sorted(preparation.problems))
    if deep:
        with phase(f"verifying what is prepared of {manifest.name}"):
            report.problems += [_damage(path, what) for path, what in preparation.find_damage()]
    preparation.check_audio_to_learn()
    return preparation


def _damage(path: Path, what: str) -> Problem:
    expected = "`ds-higgs prepare`, or a start: it makes them again, and nothing else"
    return Problem(file=str(path), number=NO_SAMPLE, sample=path.name, message=what, expected=expected)


def _statistics_table(name: str, statistics: ManifestStatistics) -> Table:
    table = Table(title=Text(name), title_justify="left", show_header=False)
    speakers = list(statistics.speakers.items())
    shown = ", ".join(f"{speaker} ({count})" for speaker, count in speakers[:MAX_SPEAKERS])
    more = f" and {len(speakers) - MAX_SPEAKERS} more" if len(speakers) > MAX_SPEAKERS else ""
    rows = {
        "samples": f"{statistics.num_samples} ({statistics.num_text_only} of text only)",
        "audio": f"{statistics.audio_hours:.2f} h in {statistics.num_clips} clips",
        "targets, references": f"{statistics.target_hours:.2f} h, {statistics.reference_hours:.2f} h",
        "target length, s": _shown(statistics.target_seconds),
        "positions per sample": f"mean {statistics.positions_per_sample:.0f}; {_shown(statistics.positions)}",
        "share that is learned": f"{statistics.target_share:.1%}",
        "can be redrawn": f"{statistics.redrawable_samples} references of {statistics.redrawable_speakers} speakers",
        "speakers": f"{len(speakers)}: {shown}{more}" if speakers else "none named",
    }
    for row in rows.items():
        _add_row(table, *row)
    return table


def _problems_table(title: str, problems: list[Problem]) -> Table:
    table = Table(title=f"{title}: {len(problems)}", title_justify="left")
    for column in ("sample", "problem", "expected"):
        table.add_column(column, overflow="fold")
    for problem in problems:
        _add_row(table, problem.sample, problem.message, problem.expected or "")
    return table


def _print_warnings(console: Console, warnings: list[DataWarning]) -> None:
    """Kind by kind, the gravest first, the first samples of each."""
    console.print(Text(f"Warnings: {len(warnings)} (`ds-higgs inspect` shows them all)"))
    for name, found in groupby(warnings, key=lambda warning: warning.kind):
        listed = list(found)
        console.print(Text(f"- {KINDS[name].title} ({len(listed)}): {KINDS[name].advice}"))
        for warning in listed[:MAX_WARNINGS]:
            console.print(Text(f"    {warning}"))


def _add_row(table: Table, *cells: str) -> None:
    """Cells as they are: a file's name or a role may hold what would be markup."""
    table.add_row(*map(Text, cells))


def _shown(percentiles: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in percentiles.items())
