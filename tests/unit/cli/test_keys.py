"""`--help` lists the keys that a command reads: held against what it looks at while it runs."""

import sys

import pytest

from ds_higgs.cli.keys import READ_BY, describe_keys, is_read
from ds_higgs.cli.main import run
from ds_higgs.config import Config
from ds_higgs.config.allowed import allowed_values
from ds_higgs.config.file import known_keys
from ds_higgs.config.sections import Section


@pytest.fixture
def keys_read(monkeypatch):
    """ "section.key" of every value of a configuration that is looked at from now on."""
    seen: set[str] = set()
    sections = {field.annotation: name for name, field in Config.model_fields.items()}
    usual = Section.__getattribute__

    def look(self, name):
        if type(self) in sections and name in type(self).model_fields:
            seen.add(f"{sections[type(self)]}.{type(self).key_of(name)}")
        return usual(self, name)

    command_line = sys.modules["ds_higgs.cli.main"]  # by its name the package has the function
    load = command_line.load_config

    def load_then_look(*arguments):
        config = load(*arguments)  # whose own checks look at keys, too
        monkeypatch.setattr(Section, "__getattribute__", look)
        return config

    monkeypatch.setattr(command_line, "load_config", load_then_look)
    return seen


@pytest.mark.parametrize("command", sorted(READ_BY))
def test_no_key_is_kept_back(command, keys_read, tiny_base, example_dir, tmp_path):
    extra = {"inspect": ["-o", str(tmp_path / "page.html")], "zero-config": ["-o", str(tmp_path / "ds.json")]}
    flags = ["--train_manifest", str(example_dir / "val.json"), "--base_ckpt", str(tiny_base)]
    places = ["--output_dir", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "codes")]
    run([command, *flags, *places, *extra.get(command, [])])
    assert keys_read
    assert {key for key in keys_read if not is_read(command, key)} == set()
    shown = {name.partition(".")[0] for name, _, _ in known_keys() if is_read(command, name)}
    assert shown <= {key.partition(".")[0] for key in keys_read} | {"run", "data", "model"}, "of no use to it"


def test_every_key_says_what_it_takes():
    allowed = allowed_values()
    assert allowed.keys() == {name for name, _, _ in known_keys()}
    assert all(allowed.values())
    assert allowed["memory.activation_checkpointing"] == "auto | none | full | a whole number from 1"
    assert allowed["lora.dropout"] == "a number from 0 below 1"
    assert allowed["data.val_manifest"] == "a path"
    assert allowed["data.train"] == "a list of: {manifest, name, weight, epochs, prompt_form, reference}"
    assert "\neval: Validation.\n" in describe_keys("train")
    assert "a path; needed, unless data.train is given\n" in describe_keys("train")
