"""`ds-higgs doctor`: whether this machine, and a job on it, can train, and what to do where it cannot."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_higgs.commands.doctor import limits, machine, network, packages
from ds_higgs.commands.doctor.finding import Finding
from ds_higgs.config import Config
from ds_higgs.errors import UserError
from ds_higgs.job.answers import answer_stream, print_answer
from ds_higgs.job.logs import phase

Check = Callable[[], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    packages.check_packages,
    packages.check_model,
    packages.check_codec_packages,
    packages.check_optional,
    machine.check_gpus,
    machine.check_compiler,
    limits.check_open_files,
    limits.check_shared_memory,
    limits.check_ranks,
    limits.check_folders,
)


def run_doctor(config: Config | None = None, *, as_json: bool = False) -> None:
    """Print what was found: of the machine, and of the job that `config` describes.

    Raises:
        UserError: listing what has to be mended before training can work.
    """
    findings = [finding for check in CHECKS for finding in check()]
    with phase("looking at the hub" if config is None else "looking at what the job needs"):
        findings += network.check_hub() if config is None else _check_job(config)
    failed = [finding for finding in findings if finding.level == "fail"]
    if as_json:
        content = {"ok": not failed, "findings": [vars(finding) for finding in findings]}
        print_answer(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        print_findings(findings)
    if failed:
        wrong = [f"{finding.what}: {finding.found}; {finding.cure}" for finding in failed]
        raise UserError.from_problems("this environment cannot train yet", wrong)


def print_findings(findings: Sequence[Finding]) -> None:
    """A table on standard output; cells as they are, for a path may hold what would be markup."""
    table = Table("", "what", "found", "cure", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(*_cells(finding))
    Console(file=answer_stream()).print(table)


def _check_job(config: Config) -> Iterator[Finding]:
    """What a configuration needs, where the packages are there that read it."""
    try:
        from ds_higgs.commands.doctor.job import check_job
    except ImportError as error:
        yield Finding("configuration", f"not looked at: {error}", "fail", "mend the packages above")
        return
    yield from check_job(config)


def _cells(finding: Finding) -> Iterable[Text]:
    return map(Text, (finding.level, finding.what, finding.found, finding.cure))
