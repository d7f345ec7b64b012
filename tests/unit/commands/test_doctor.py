"""`doctor` finds what would stop training, and says what to do."""

import pytest

from ds_higgs.commands import doctor
from ds_higgs.errors import UserError


def test_a_missing_or_other_version_is_wrong_with_its_remedy():
    missing = doctor.check_version("no-such-package", "1.0", "pip install no-such-package==1.0")
    assert (missing.ok, missing.found, missing.remedy) == (False, "not installed", "pip install no-such-package==1.0")
    assert not doctor.check_version("pydantic", "0.0.1", "pip install pydantic==0.0.1").ok
    assert doctor.check_version("peft", doctor.version("peft"), "").ok


def test_findings_are_printed_and_wrong_ones_are_errors(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Finding("disk", "full", False, "empty it")]),))
    with pytest.raises(UserError, match="disk: full; empty it"):
        doctor.run_doctor()
    assert "disk" in capsys.readouterr().out


def test_the_compiler_is_looked_for(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    findings = list(doctor.check_compiler())
    assert [finding.ok for finding in findings] == [False, False]
    assert "g++" in findings[0].remedy


def test_this_environments_model_is_bosons_own():
    [finding] = doctor.check_model()
    assert finding.ok, finding
