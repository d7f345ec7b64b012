"""`ds-higgs validate`: what its report shows."""

import shutil

from ds_higgs.commands.validate import Report, collect_report, print_report
from ds_higgs.config import Config
from ds_higgs.data.problems import Problem


def test_names_that_hold_brackets_are_shown_as_they_are(capsys):
    """They are no markup: "[b]" would vanish, and "[/]" would end the report with a traceback."""
    problem = Problem("a[b].json", 0, "a[b].json:0", "unknown role '[/]'", "[bold]")
    print_report(Report(problems=[problem]))
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("a[b].json:0", "unknown role '[/]'", "[bold]"))


def test_what_training_would_load_is_loaded(tiny_base, example_dir, tmp_path):
    """The codec and the weights: their files are there, and only reading them tells that they do not fit."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for file, old, new in (
        (base / "config.json", '"intermediate_size": 256', '"intermediate_size": 128'),
        (base / "codec" / "config.json", '"hidden_size": 32', '"hidden_size": "x"'),
    ):
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    values = {
        "run": {"output_dir": tmp_path / "run"},
        "model": {"base": str(base)},
        "data": {"train_manifest": example_dir / "val.json", "cache_dir": tmp_path / "codes"},
    }
    report = collect_report(Config.model_validate(values))
    told = {problem.sample: problem.message for problem in report.problems}
    assert "the weights do not fit" in told["model.base"]
    assert "the audio codec cannot be loaded" in told["data.codec"]
