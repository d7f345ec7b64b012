"""A rehearsal: what the base says is learned code for code, and a rehearsal that was stopped goes on."""

import json
from pathlib import Path

import pytest
import torch

from ds_higgs.cli.main import run as run_command
from ds_higgs.commands import rehearse as command
from ds_higgs.data.build import build_dataset
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.rules import build_rules
from ds_higgs.errors import UserError
from ds_higgs.model.loading import load_tokenizer, read_model_config

TEXTS = ["Good morning.", "", "How are you?", "The ferry leaves at seven.", "Fine."]


@pytest.fixture
def rehearse(tiny_base: Path, tmp_path: Path):
    def run(*options: str, texts=TEXTS) -> list[dict]:
        (tmp_path / "texts.txt").write_text("\n".join(texts))
        arguments = ["--base", str(tiny_base), "--texts", str(tmp_path / "texts.txt"), "-o", str(tmp_path / "out")]
        limits = ["--cache-dir", str(tmp_path / "cache"), "--max-seconds", "8"]
        run_command(["rehearse", *arguments, *limits, "--temperature", "1", *options])
        return [json.loads(line) for line in (tmp_path / "out" / "spoken.jsonl").read_text().splitlines()]

    return run


def read_codes(tiny_base: Path, tmp_path: Path) -> list[torch.Tensor]:
    """Of the manifest's samples, as training has them."""
    rules = build_rules(
        tokenizer=load_tokenizer(tiny_base),
        model_config=read_model_config(tiny_base),
        codec=find_codec(None, tiny_base),
    )
    dataset = build_dataset(tmp_path / "out" / "replay.jsonl", rules=rules, cache_dir=tmp_path / "cache")
    return [dataset[index].get_audio_codes(0) for index in range(len(dataset))]


def test_what_is_spoken_is_learned_code_for_code(rehearse, tiny_base, tmp_path, monkeypatch):
    said = []
    original = command.generate_codes

    def listen(*arguments, **options):
        said.append(original(*arguments, **options))
        return said[-1]

    monkeypatch.setattr(command, "generate_codes", listen)
    rows = rehearse()
    assert [row["text"] for row in rows] == [text for text in TEXTS if text]
    kept = [one.codes for one, row in zip(said, rows, strict=True) if row["file"]]
    assert len(kept) >= 2
    found = read_codes(tiny_base, tmp_path)
    assert len(found) == len(kept)
    assert all(torch.equal(one, expected) for one, expected in zip(found, kept, strict=True))
    assert len({codes.numpy().tobytes() for codes in kept}) == len(kept), "each text has a seed of its own"


def test_a_stopped_rehearsal_goes_on(rehearse, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "AT_ONCE", 1)
    original, calls = command.generate_codes, []

    def stop_at_the_third(*arguments, **options):
        calls.append(options["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(command, "generate_codes", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        rehearse("--max-seconds", "1")
    rows = rehearse("--max-seconds", "1")
    assert calls == [0, 1, 2, 2, 3]
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    manifest = (tmp_path / "out" / "replay.jsonl").read_text().splitlines()
    assert len(manifest) == sum(row["file"] is not None for row in rows)
    with pytest.raises(UserError, match="holds a rehearsal with other texts, seed; expected a new folder"):
        rehearse("--max-seconds", "1", "--seed", "1", texts=["Another."])


def test_speech_without_an_end_is_left_out(rehearse, tmp_path):
    rows = rehearse("--max-seconds", "0.3")
    assert {row["reason"] for row in rows if row["file"] is None} == {"the model did not end"}
    assert {f"audio/{file.name}" for file in (tmp_path / "out" / "audio").iterdir()} == {
        row["file"] for row in rows if row["file"]
    }


def test_mistakes_are_told(rehearse):
    with pytest.raises(UserError, match=r"texts\.txt: no text in it; expected one a line"):
        rehearse(texts=["", " "])
