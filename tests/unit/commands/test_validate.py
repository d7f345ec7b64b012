"""`ds-higgs validate`: what its report shows."""

from ds_higgs.commands.validate import Report, print_report
from ds_higgs.data.problems import Problem


def test_names_that_hold_brackets_are_shown_as_they_are(capsys):
    """They are no markup: "[b]" would vanish, and "[/]" would end the report with a traceback."""
    problem = Problem("a[b].json", 0, "a[b].json:0", "unknown role '[/]'", "[bold]")
    print_report(Report(problems=[problem]))
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("a[b].json:0", "unknown role '[/]'", "[bold]"))
