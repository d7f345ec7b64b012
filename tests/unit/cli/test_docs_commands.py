"""Pages whose commands need hours or a network: every command and flag in them is one that the parser takes."""

import re
import shlex

import pytest
import yaml

from ds_higgs.cli.main import build_parser, parse_overrides
from ds_higgs.config.file import known_keys
from tests.support.launching import ROOT

DOCS = ROOT / "docs"
PAGES = ("arabic_voice.md", "modes.md", "symptoms.md", "migration.md")


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_the_parser_takes_every_command(page):
    blocks = re.findall(r"```bash\n(.*?)```", read(page), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "ds-higgs"
        _, rest = build_parser().parse_known_args(arguments)
        parse_overrides(rest)
    assert lines or page == "migration.md"


@pytest.mark.parametrize("page", PAGES)
def test_keys_files_and_links_that_are_named_exist(page):
    known = {name for name, _, _ in known_keys()}
    sections = {name.partition(".")[0] for name in known}
    for name in re.findall(r"`(?:--)?([a-z]+\.[a-z_]+)\b(?!\.)", read(page)):
        section = name.partition(".")[0]
        assert section not in sections or name in known, name
    for path in re.findall(r"`(launch/[\w.]+)`", read(page)) + re.findall(r"\]\(([\w./]+)\)", read(page)):
        assert (ROOT / path).exists() or (DOCS / path).exists(), path
    commands = set(build_parser()._subparsers._group_actions[0].choices)  # argparse has no public way
    assert set(re.findall(r"`ds-higgs ([a-z-]+)", read(page))) <= commands


def test_the_site_has_every_page():
    named = {page for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for page in entry.values()}
    assert named == {path.name for path in DOCS.glob("*.md")}
