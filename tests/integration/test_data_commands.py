"""`ds-higgs validate` and `prepare` as people run them, from the command line on."""

import json

import pytest

from ds_higgs.cli.main import run
from ds_higgs.data.arrow_files import read_table
from ds_higgs.data.review.kinds import KINDS
from ds_higgs.errors import UserError
from tests.support.planted_faults import EXPECTED, write_planted


@pytest.fixture
def broken(example_dir, tmp_path):
    """The example with a sample that names a missing file and one of an unknown role, as JSON lines."""
    samples = json.loads((example_dir / "train.json").read_text())[:4]
    samples[1]["messages"][0]["role"] = "narrator"
    samples[2]["messages"][2]["content"][1]["audio_url"] = "audio/absent.flac"
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return [f"--train_manifest={path}", f"--data.audio_root={example_dir}"]


def test_prepare_encodes_once_and_says_so(example_flags, capsys):
    run(["prepare", *example_flags])
    assert "24 encoded now, 0 in the cache already" in capsys.readouterr().out
    run(["prepare", *example_flags])
    assert "0 encoded now, 24 in the cache already" in capsys.readouterr().out


def test_several_processes_prepare_what_one_does(example_flags, tmp_path):
    run(["prepare", *example_flags, f"--data.cache_dir={tmp_path / 'alone'}"])
    run(["prepare", "--processes", "2", *example_flags])
    codes = [codes_in(tmp_path / name) for name in ("alone", "cache")]
    assert len(codes[0]) == 24 + 8
    assert codes[0] == codes[1]


def codes_in(cache_dir):
    files = cache_dir.glob("codes/*/clips-*.arrow")
    return {row["key"]: row["codes"] for file in files for row in read_table(file).to_pylist()}


def test_prepare_refuses_a_broken_manifest_and_still_encodes_the_other(example_flags, broken, capsys):
    with pytest.raises(
        UserError, match=r"(?s)broken.jsonl:2: .*narrator.*broken.jsonl:3: target audio .*: file not found"
    ):
        run(["prepare", *example_flags, *broken])
    assert "val.json: 8 samples" in capsys.readouterr().out


def test_prepare_may_leave_bad_samples_out(example_flags, broken, capsys):
    run(["prepare", *example_flags, *broken, "--data.on_bad_sample=skip"])
    assert "broken.jsonl: 2 samples (2 left out)" in capsys.readouterr().out


def test_validate_reports_a_sound_manifest(example_flags, capsys):
    run(["validate", *example_flags, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["problems"] == report["rejected"] == []
    assert report["warnings"] == []
    train, _ = report["manifests"].values()
    assert train["num_samples"] == 24
    assert train["speakers"] == {f"speaker_00{number}": 6 for number in (1, 2, 3, 4)}
    assert 0 < train["target_share"] < 1
    run(["validate", *example_flags])
    assert "Nothing would stop training." in capsys.readouterr().out


def test_validate_lists_every_problem_with_its_place(example_flags, broken, tiny_base, capsys):
    with pytest.raises(UserError, match="2 problems would stop training"):
        run(["validate", *example_flags, *broken, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert [(found["number"], found["sample"]) for found in report["problems"]] == [
        (2, "broken.jsonl:2"),
        (3, "broken.jsonl:3"),
    ]
    assert report["problems"][0]["expected"] == "one of system, user, assistant"

    run(["validate", *example_flags, *broken, "--json", "--data.on_bad_sample=skip"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert len(report["rejected"]) == 2


def test_validate_names_every_planted_fault(example_flags, example_dir, tmp_path, capsys):
    train, val = write_planted(tmp_path / "planted", example_dir)
    run(["validate", *example_flags, f"--train_manifest={train}", f"--val_manifest={val}", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    found = {(warning["sample"], warning["kind"]) for warning in report["warnings"]}
    assert set(EXPECTED.items()) <= found
    assert {sample for sample, _ in found} == set(EXPECTED)
    run(["validate", *example_flags, f"--train_manifest={train}", f"--val_manifest={val}"])
    shown = capsys.readouterr().out
    assert all(KINDS[kind].title in shown for kind in EXPECTED.values())


def test_validate_goes_on_after_a_manifest_that_is_no_json(example_flags, tmp_path, capsys):
    (tmp_path / "cut.json").write_text('[{"messages": [')
    with pytest.raises(UserError, match="1 problem would stop training"):
        run(["validate", *example_flags, f"--train_manifest={tmp_path / 'cut.json'}", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert "line 1, column 16: malformed JSON" in report["problems"][0]["message"]
    assert len(report["manifests"]) == 1


def test_validate_tells_a_wrong_base_checkpoint(example_flags, tmp_path, capsys):
    with pytest.raises(UserError, match="would stop training"):
        run(["validate", *example_flags, f"--base_ckpt={tmp_path}", "--json"])
    assert json.loads(capsys.readouterr().out)["problems"][0]["file"] == "model.base"
