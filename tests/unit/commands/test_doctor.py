"""`doctor` finds what would stop training, and says what to do: planted faults, one at a time."""

import json
import resource
import shutil
from collections import namedtuple

import pytest

from ds_higgs import hub
from ds_higgs.commands import doctor
from ds_higgs.commands.doctor import limits, machine, network, packages
from ds_higgs.commands.doctor.finding import Finding
from ds_higgs.commands.doctor.job import check_job, judge_memory
from ds_higgs.config import Config
from ds_higgs.errors import UserError
from ds_higgs.job import devices
from tests.support.in_process import fail_imports

Usage = namedtuple("Usage", "total used free")


def findings_of(check, *arguments) -> dict[str, Finding]:
    return {finding.what: finding for finding in check(*arguments)}


@pytest.fixture
def config(tiny_base, example_dir, tmp_path):
    def build(**changes) -> Config:
        sections = {
            "run": {"output_dir": tmp_path / "run"},
            "model": {"base": str(tiny_base)},
            "data": {"train_manifest": example_dir / "train.json", "cache_dir": tmp_path / "codes"},
        }
        return Config.model_validate(
            {name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes}
        )

    return build


def test_a_missing_or_other_version_fails_with_its_cure():
    missing = packages.check_version("no-such-package", "1.0", "pip install no-such-package==1.0")
    assert missing == Finding("no-such-package", "not installed", "fail", "pip install no-such-package==1.0")
    assert packages.check_version("pydantic", "0.0.1", "pip install pydantic==0.0.1").level == "fail"
    assert packages.check_version("peft", packages.version("peft"), "").level == "ok"


def test_findings_are_printed_and_failures_are_errors(monkeypatch, capsys):
    checks = (lambda: iter([Finding("disk", "full", "fail", "empty it"), Finding("files", "few", "warn", "more")]),)
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(network, "check_hub", lambda: iter(()))
    with pytest.raises(UserError, match="disk: full; empty it") as raised:
        doctor.run_doctor()
    assert "files" not in str(raised.value)
    assert "disk" in capsys.readouterr().out
    with pytest.raises(UserError):
        doctor.run_doctor(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["findings"][1] == {"what": "files", "found": "few", "level": "warn", "cure": "more"}


def test_the_compiler_is_looked_for(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda program: None)
    [finding] = machine.check_compiler()
    assert finding.level == "warn"
    assert "g++" in finding.cure
    assert "memory.compile" in finding.cure


def test_this_environments_model_and_codec_packages_are_well():
    [model] = packages.check_model()
    [codec] = packages.check_codec_packages()
    assert (model.level, codec.level) == ("ok", "ok"), (model, codec)


def test_torchaudio_beside_cpu_torch(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr(packages.PathFinder, "find_spec", lambda name: name if name == "torchaudio" else None)
    [finding] = packages.check_codec_packages()
    assert (finding.level, finding.cure) == ("fail", "pip uninstall torchaudio")


def test_a_package_that_the_codec_needs_is_missing(monkeypatch):
    fail_imports(monkeypatch, of="boson_multimodal.audio_processing", lacking="audiotools")
    [finding] = packages.check_codec_packages()
    assert finding.level == "fail"
    assert "audiotools" in finding.found
    assert "pip install" in finding.cure


@pytest.mark.parametrize(
    ("driver", "cuda", "level"),
    [("550.54.15", "13.0", "fail"), ("580.65.06", "13.0", "ok"), ("535.0", "12.6", "ok"), ("550.54.15", None, "fail")],
)
def test_the_driver_is_compared_with_torchs_wheel(driver, cuda, level):
    finding = machine.compare_driver(driver, cuda)
    assert finding.level == level
    assert ("launch/install.sh" in finding.cure) == (level == "fail")


def test_the_driver_is_read_from_the_kernel(monkeypatch, tmp_path):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\nGCC version:  gcc 12.2.0\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    assert devices.read_driver() == "550.54.15"
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "none")
    assert devices.read_driver() is None


def test_too_few_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    [finding] = limits.check_open_files()
    assert finding.level == "warn"
    assert "ulimit -n" in finding.cure


def test_a_containers_small_shared_memory(monkeypatch):
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))
    [finding] = limits.check_shared_memory()
    assert finding.level == "warn"
    assert "--shm-size" in finding.cure


def test_ranks_that_cannot_meet_or_have_no_gpu():
    environment = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "9", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    alone = findings_of(limits.judge_ranks, environment | {"MASTER_ADDR": ""}, 16)
    assert alone["launcher"].found == "MASTER_ADDR not set"
    crowded = findings_of(limits.judge_ranks, environment, 8)
    assert crowded["launcher"].level == "fail"
    assert "at most 8 ranks" in crowded["launcher"].cure
    assert "launcher" not in findings_of(limits.judge_ranks, environment, 16)


def test_a_folder_for_extensions_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    monkeypatch.setenv("PATH", packages.sys.prefix + "/bin")
    found = findings_of(limits.check_folders)
    assert found["TORCH_EXTENSIONS_DIR"].level == "fail"


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(NOT_CACHED))
    monkeypatch.setattr(hub.HfApi, "model_info", refuse)
    findings = list(network.check_hub())
    assert [finding.level for finding in findings] == ["warn", "warn"], "no job is named that needs them"
    assert network.find_repository(hub.HIGGS_TOKENIZER, None).level == "fail"
    assert "no route" in findings[0].found
    assert "ds-higgs download" in findings[0].cure
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in network.find_repository(hub.HIGGS_TOKENIZER, None).found


NOT_CACHED = hub.LocalEntryNotFoundError("nothing")


def test_a_job_that_can_train_has_nothing_wrong(config):
    found = findings_of(check_job, config())
    assert {finding.level for finding in found.values()} == {"ok"}, found
    assert "dac" in found["audio codec"].found


def test_a_job_whose_folders_manifest_and_switches_are_wrong(config, tmp_path):
    (tmp_path / "file").write_text("")
    wrong = config(
        run={"output_dir": tmp_path / "file" / "run"},
        data={"train_manifest": tmp_path / "none.json", "cache_dir": tmp_path / "file"},
        model={"quantization": "nf4"},
        logging={"comet": "project"},
    )
    found = findings_of(check_job, wrong)
    failed = {what for what, finding in found.items() if finding.level == "fail"}
    assert failed == {"manifest", "run.output_dir", "data.cache_dir", "memory section", "trackers"}
    assert all(found[what].cure for what in failed)


def test_a_codec_that_cannot_be_loaded(config, tiny_base, tmp_path):
    """Its files are there: only loading tells."""
    broken = tmp_path / "codec"
    shutil.copytree(tiny_base / "codec", broken)
    text = (broken / "config.json").read_text()
    (broken / "config.json").write_text(text.replace('"hidden_size": 32', '"hidden_size": "x"'))
    found = findings_of(check_job, config(data={"codec": str(broken)}))
    assert found["audio codec"].level == "fail"


def test_weights_of_another_model(config, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace('"intermediate_size": 256', '"intermediate_size": 128'))
    found = findings_of(check_job, config(model={"base": str(base)}))
    assert found["weights"].level == "fail"
    assert "found shape" in found["weights"].found


def test_a_revision_in_the_other_format(config, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(NOT_CACHED))
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: (_ for _ in ()).throw(ConnectionError()))
    found = findings_of(check_job, config(model={"base": hub.RELEASED_NAMES[1], "revision": "main"}))
    assert found["model.revision"].level == "warn"
    assert found[hub.RELEASED_NAMES[1]].level == "fail"


def test_too_little_disk_and_memory(config, monkeypatch):
    from ds_higgs.commands.doctor import job

    monkeypatch.setattr(job.shutil, "disk_usage", lambda _: Usage(2**20, 0, 2**20))
    found = findings_of(check_job, config())
    assert found["disk of run.output_dir"].level == "fail"
    assert "checkpoint.keep_latest" in found["disk of run.output_dir"].cure
    assert judge_memory(2**34, 2**33, 900).level == "fail"
    assert judge_memory(2**33, 2**34, 900).level == "ok"


def test_the_path_of_doctor_needs_no_model(monkeypatch):
    """Without boson_multimodal the table still comes, with the command that installs it."""
    fail_imports(monkeypatch, of="ds_higgs.commands.doctor.job", lacking="boson_multimodal")
    [finding] = doctor._check_job(object())
    assert finding.level == "fail"
    assert "boson_multimodal" in finding.found
