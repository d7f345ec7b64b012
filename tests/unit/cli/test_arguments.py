"""Numbers on the command line that no command can use: status 2, with what was found and what was expected."""

import pytest

from ds_higgs.cli.main import main

CONFIG = ["--model.base", "b", "--run.output_dir", "o", "--data.train_manifest", "t"]
SPEAK = ["generate", "--base", "b", "--text", "a", "-o", "x.wav"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["estimate", *CONFIG, "--world-size", "0"], "--world-size: found '0', expected a whole number from 1"),
        (["estimate", *CONFIG, "--positions", "9" * 5000], "--positions: found '9999"),
        (["estimate", *CONFIG, "--card-gib", "24", "inf"], "--card-gib: found 'inf', expected GiB"),
        (["tune", *CONFIG, "--timeout-s", "nan"], "--timeout-s: found 'nan', expected a number above 0"),
        (["init-tiny", "folder", "--seed", str(2**70)], "--seed: found '1180591620717411303424'"),
        (["manifest", "folder", "-o", "out.json", "--split", "-1"], "--split: found '-1'"),
        ([*SPEAK, "--top-p", "2"], "--top-p: found '2', expected a number above 0, up to 1"),
        ([*SPEAK, "--temperature", "inf"], "--temperature: found 'inf', expected a number of 0 or more"),
        ([*SPEAK, "--max-seconds", "1e300"], "--max-seconds: found '1e300'"),
        ([*SPEAK, "--seed", "-1"], "--seed: found '-1'"),
        ([*SPEAK, "--device", "abacus"], "--device: found 'abacus', expected cpu"),
        (["evaluate", "run", "--batch-size", "0"], "--batch-size: found '0'"),
    ],
)
def test_a_number_that_cannot_be_used_is_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("output", [".", "/dev/null/x.json", "x" * 300, "a\0b"])
def test_an_output_that_cannot_be_written_is_told(output, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["zero-config", *CONFIG, "-o", output]) == 2
    assert capsys.readouterr().err.startswith("ds-higgs: --output: ")


def test_an_output_in_a_new_folder(tmp_path):
    assert main(["zero-config", *CONFIG, "-o", str(tmp_path / "new" / "ds.json")]) == 0
    assert (tmp_path / "new" / "ds.json").read_text().startswith("{")


def test_an_argument_that_is_no_text_is_told(capsys):
    assert main(["zero-config", *CONFIG, "\udcff"]) == 2
    assert r"\udcff: expected a flag" in capsys.readouterr().err
