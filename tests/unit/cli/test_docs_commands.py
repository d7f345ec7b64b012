"""Pages whose commands need hours or a network: every command and flag in them is one that the parser takes."""

import os
import re
import shlex
import sys

import pytest
import soundfile
import yaml

from ds_higgs.cli.main import build_parser, main, parse_overrides
from ds_higgs.config.file import known_keys
from tests.support import launching
from tests.support.launching import ROOT

DOCS = ROOT / "docs"
WITHOUT_TRAINING = ("init", "validate", "doctor", "estimate", "zero-config", "inspect", "prepare")
PAGES = ("arabic_voice.md", "choosing.md", "clusters.md", "modes.md", "symptoms.md", "migration.md")


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
    assert lines or page in ("migration.md", "symptoms.md")


def commands_of(page: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", read(page), flags=re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


@pytest.mark.costly
@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)])
def test_commands_that_need_no_training_run(page, tiny_base, example_dir, tmp_path, monkeypatch, capsys):
    """In a folder with `recordings`, a tiny `base` and `job/config.yaml`, as the pages go on from."""
    monkeypatch.chdir(tmp_path)
    scripts = f"{sys.prefix}/bin:{os.environ['PATH']}"
    place = {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": "cache", "TORCH_EXTENSIONS_DIR": "extensions", "PATH": scripts}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "base").symlink_to(tiny_base)
    (tmp_path / "recordings").mkdir()
    for number, path in enumerate(sorted((example_dir / "audio").glob("speaker_001_0[0-3]*.flac"))):
        samples, rate = soundfile.read(path)
        soundfile.write(tmp_path / "recordings" / f"{number}.wav", samples, rate)
        (tmp_path / "recordings" / f"{number}.txt").write_text("The weather is fine today.")
    commands = [command for command in commands_of(page) if command[0] in WITHOUT_TRAINING]
    if commands and not any(command[0] == "init" for command in commands):
        commands.insert(0, ["init", "recordings", "-o", "job/config.yaml"])
    for command in commands:
        base = ["--base", "base"] if command[0] == "init" else []
        assert main([*command, *base]) == 0, (command, capsys.readouterr().err)


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    done = launching.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path / "site"])
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "site" / "choosing" / "index.html").is_file()


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
