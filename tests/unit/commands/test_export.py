"""What an export writes, from a run's folder or an adapter's: it loads, it says where it comes from, it is whole."""

import ast
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from huggingface_hub import HfApi
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from ds_higgs import hub
from ds_higgs.adapters.card import _SPEAK, write_card, write_command, write_usage
from ds_higgs.adapters.merging import load_adapter, merge_adapter
from ds_higgs.adapters.publishing import LICENCE_NAME
from ds_higgs.cli.main import main
from ds_higgs.commands.export import Publishing, export
from ds_higgs.errors import UserError
from ds_higgs.hub import ORIGINAL_REVISION, RELEASED_REPOSITORY
from ds_higgs.model.loading import (
    load_model,
    load_tokenizer,
    resolve_base,
)
from tests.support.hub_stand_in import serve_hub
from tests.support.runs import write_adapter, write_run


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with adapters of steps 5 and 10 and a final one; read only."""
    folder = tmp_path_factory.mktemp("runs") / "voice"
    write_run(folder, tiny_base)
    return folder


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_final_adapter_is_taken_unless_a_step_is_named(run: Path, tmp_path: Path):
    export(run, tmp_path / "final")
    export(run, tmp_path / "five", step=5)
    assert_same(read_adapter(tmp_path / "final"), read_adapter(run / "adapters" / "final"))
    assert_same(read_adapter(tmp_path / "five"), read_adapter(run / "adapters" / "step-00000005"))
    with pytest.raises(UserError, match="no adapter of step 7; found steps: 5, 10"):
        export(run, tmp_path / "seven", step=7)


def write_record(adapter: Path, **values) -> None:
    record = {"step": 5, "seed": 7, "samples": 40, "audio_targets": 720_000, "losses": {"loss": 1.5}}
    config = {"run": {"seed": 7, "output_dir": "out"}, "optim": {"learning_rate": 0.25}}
    record |= {"losses_are_of": "validation", "config": config, **values}
    (adapter / "training.json").write_text(json.dumps(record))


@pytest.fixture
def extended(run: Path, tmp_path: Path) -> Path:
    """The run, gone on past its end at step 10 and stopped at step 15; its final adapter is still there."""
    folder = tmp_path / "extended"
    shutil.copytree(run, folder)
    shutil.copytree(run / "adapters" / "step-00000005", folder / "adapters" / "step-00000015")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    lines = [line for line in lines if line["event"] != "end"]  # a run that goes on takes it back
    lines += [dict(lines[0], step=15), {"event": "end", "step": 15, "reason": "stopped"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("recorded", [False, True])
def test_a_final_adapter_that_the_run_has_left_behind_is_not_taken(extended: Path, tmp_path: Path, recorded: bool):
    if recorded:
        write_record(extended / "adapters" / "final", step=10)
        write_record(extended / "adapters" / "step-00000015", step=15)
    export(extended, tmp_path / "out")
    assert_same(read_adapter(tmp_path / "out"), read_adapter(extended / "adapters" / "step-00000015"))
    assert "15 optimizer steps" in (tmp_path / "out" / "README.md").read_text()
    export(extended, tmp_path / "ten", step=10)
    assert_same(read_adapter(tmp_path / "ten"), read_adapter(extended / "adapters" / "step-00000010"))


def test_the_card_tells_what_the_adapter_records_wherever_it_is(run: Path, tmp_path: Path):
    """Its run has started anew since: other steps, another seed."""
    aside = tmp_path / "run" / "adapters" / "superseded" / "final-1"
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "adapters" / "final", aside)
    for adapter in (aside, tmp_path / "run" / "adapters" / "step-00000010"):
        write_record(adapter)
        export(adapter, tmp_path / adapter.name)
        card = (tmp_path / adapter.name / "README.md").read_text()
        assert "5 optimizer steps over 40 samples (every pass counted), seed 7" in card
        assert "1.00 hours" in card
        assert "last validation losses: loss 1.5000" in card
        assert "learning_rate: 0.25" in card
        assert not (tmp_path / adapter.name / "training.json").exists()


def test_a_damaged_record_is_left_out_with_a_warning(extended: Path, tmp_path: Path, caplog):
    for name, text in (("final", "{"), ("step-00000015", '{"step": -1}')):
        (extended / "adapters" / name / "training.json").write_text(text)
    export(extended, tmp_path / "out")
    assert_same(read_adapter(tmp_path / "out"), read_adapter(extended / "adapters" / "step-00000015"))
    assert "training.json" in caplog.text


SPOKEN = [*["ds-higgs", "generate", "--base", "--adapter", "--revision", "--text", "-o", "speech.wav"], "Good morning."]
EVIL = 'x"); import os; os.system("touch owned"); ("'
BREAKING = "a`b``c```d\n```\n# heading <img src=x> [link](y) *z*"


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("name", [EVIL, BREAKING])
@pytest.mark.parametrize("merged", [False, True])
def test_names_in_the_card_stay_names(name: str, layout, merged: bool):
    usage = write_usage(title=name, base=name, revision=name, merged=merged, layout=layout)
    ours = {node.value for node in ast.walk(ast.parse(_SPEAK)) if isinstance(node, ast.Constant)}
    assert {node.value for node in ast.walk(ast.parse(usage)) if isinstance(node, ast.Constant)} - ours == {name}
    calls = [node.func for node in ast.walk(ast.parse(usage.replace(_SPEAK, ""))) if isinstance(node, ast.Call)]
    assert all(isinstance(call, ast.Attribute) and call.attr == "from_pretrained" for call in calls)
    config = yaml.safe_dump({"data": {"train_manifest": name}}, default_style="|")
    options = {"title": name, "base": name, "revision": name, "licence": name, "merged": merged}
    command = write_command(title=name, base=name, revision=name, merged=merged)
    assert {word for word in shlex.split(command) if word not in SPOKEN} == {name}
    heard = {"command": command, "samples": ["samples/000.wav"]}
    card = write_card(**options, **heard, usage=usage, facts=["a fact"], config=config)
    _, header, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert (yaml.safe_load(header)["base_model"], yaml.safe_load(header)["license"]) == (name, name)
    tokens = MarkdownIt("commonmark").parse(body)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2", "h2"]
    assert [token.content.strip() for token in tokens if token.type == "fence"] == [
        command.strip(),
        usage.strip(),
        config.strip(),
    ]
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    ours = {'<audio controls src="samples/000.wav">', "</audio>"}
    assert {child.type for child in inline if child.content not in ours} <= {"text", "code_inline"}
    assert [child.content for child in inline if child.type == "code_inline"] == [" ".join(name.split())] * 2


def test_an_exported_adapter_loads_on_its_base(run: Path, tiny_base: Path, tmp_path: Path):
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)
    load_adapter(load_model(tiny_base, dtype=torch.float32), tmp_path / "out")


def test_the_released_base_is_named_with_its_revision(run: Path, tmp_path: Path):
    export(run, tmp_path / "out", base=RELEASED_REPOSITORY)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (RELEASED_REPOSITORY, ORIGINAL_REVISION)
    export(run, tmp_path / "native", base=RELEASED_REPOSITORY, layout="transformers")
    config = json.loads((tmp_path / "native" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (RELEASED_REPOSITORY, None)


@pytest.mark.costly
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_a_merged_model_is_a_base_to_go_on_from(run: Path, tiny_base: Path, tmp_path: Path, layout, precision):
    export(run, tmp_path / "out", merge=True, layout=layout, precision=precision)
    merged = resolve_base(str(tmp_path / "out"), None)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    loaded = load_model(merged, dtype=dtype)
    adapted = load_adapter(load_model(tiny_base, dtype=torch.float32), run / "adapters" / "final")
    assert_same(loaded.state_dict(), merge_adapter(adapted, dtype=dtype).state_dict())
    assert {weight.dtype for weight in load_file(merged / "model.safetensors").values()} == {dtype}
    assert load_tokenizer(merged).encode("صباح الخير") == load_tokenizer(tiny_base).encode("صباح الخير")
    assert (merged / "codec" / "config.json").is_file()


def test_what_was_trained_whole_in_fp32_is_not_rounded_to_the_bases_precision(tiny_base: Path, tmp_path: Path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    load_model(tiny_base, dtype=torch.bfloat16).save_pretrained(base)
    write_adapter(base, tmp_path / "adapter", seed=1)
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, precision="fp32", base=str(base))
    [trained] = [weight for name, weight in read_adapter(tmp_path / "adapter").items() if "audio_lm_head" in name]
    merged = load_model(tmp_path / "merged", dtype=torch.float32).audio_decoder_proj.audio_lm_head.weight
    assert trained.dtype == torch.float32
    assert torch.equal(merged, trained)


def test_the_card_tells_base_licence_training_and_use(run: Path, tiny_base: Path, tmp_path: Path):
    export(run, tmp_path / "out", step=5, licence="cc-by-4.0")
    _, header, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert (fields["base_model"], fields["license"]) == (tiny_base.name, "cc-by-4.0")
    assert fields["library_name"] == "peft"
    assert "5 optimizer steps over 8 samples" in body
    assert "0.10 hours" in body  # 72,000 targets / 8 codebooks / 25 frames a second
    assert "validation losses: loss 7.0000, text_loss 3.0000, audio_loss 4.0000" in body
    assert "learning_rate: 0.005" in body
    compile(body.split("```python\n")[1].split("```")[0], "usage", "exec")


def test_an_adapter_outside_a_run_is_exported_without_its_history(run: Path, tiny_base: Path, tmp_path: Path):
    write_adapter(tiny_base, tmp_path / "alone", seed=1)
    export(tmp_path / "alone", tmp_path / "out")
    assert_same(read_adapter(tmp_path / "out"), read_adapter(tmp_path / "alone"))
    assert "## Training" not in (tmp_path / "out" / "README.md").read_text()


def test_nothing_is_overwritten_and_nothing_half_done_is_left(run: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="expected a new or empty folder"):
        export(run, tmp_path / "full")
    with pytest.raises(UserError):
        export(run, tmp_path / "out", merge=True, base=str(tmp_path / "no_base"))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_folder_without_anything_to_export_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not the folder of a run"):
        export(tmp_path, tmp_path / "out")


def test_half_an_adapter_is_the_same_as_an_adapter_and_merged(run: Path, tiny_base: Path, tmp_path: Path):
    for name, options in (("adapter", {}), ("merged", {"merge": True, "precision": "fp32"})):
        export(run, tmp_path / name, lora_scale=0.5, **options)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["base_model_name_or_path"]) == (2.0, str(tiny_base))
    half = load_adapter(load_model(tiny_base, dtype=torch.float32), tmp_path / "adapter")
    assert_same(
        load_file(tmp_path / "merged" / "model.safetensors"), merge_adapter(half, dtype=torch.float32).state_dict()
    )


LICENCES = {"LICENSE": "Boson's", "META_LLAMA_3_LICENSE": "Meta's", "NOTICE": "and one more notice"}


@pytest.fixture
def licensed(tiny_base: Path, tmp_path: Path) -> Path:
    """A base with its licences, as it is released."""
    base = tmp_path / "private" / "licensed"
    shutil.copytree(tiny_base, base)
    for name, text in LICENCES.items():
        (base / name).write_text(text)
    return base


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_may_be_published(run: Path, licensed: Path, tmp_path: Path, merged: bool):
    """Licences and notice, no place of this machine, something to hear, and a command that speaks."""
    heard = tmp_path / "private" / "heard"
    shutil.copytree(run, heard)
    for step in (5, 99):
        (heard / "samples" / f"step-{step:08d}").mkdir(parents=True)
        for number in range(5):
            soundfile.write(heard / "samples" / f"step-{step:08d}" / f"{number:03d}.wav", np.zeros(100), 24_000)
    write_record(heard / "adapters" / "final", step=10, config={"run": {"seed": 7, "output_dir": str(heard)}})
    out = tmp_path / "higgs-audio-2-voice"
    export(heard, out, base=str(licensed), merge=merged)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {*LICENCES, "samples/000.wav", "samples/002.wav"} <= names
    assert "samples/003.wav" not in names
    notice = (out / "NOTICE").read_text()
    assert "Meta Llama 3 is licensed under" in notice
    assert "and one more notice" in notice
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n", 2)[1])
    assert (header["license"], header["license_name"]) == ("other", LICENCE_NAME)
    assert header["license_link"].endswith("/LICENSE")
    assert '<audio controls src="samples/000.wav"></audio>' in card
    assert "Built with Higgs Materials" in card
    private = [path.name for path in out.rglob("*.*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    assert private == ([] if merged else ["adapter_config.json"]), "the adapter's own way to its base"
    # What the card says, as a shell has it, beside the folder and the base.
    command = shlex.split(re.search(r"```bash\n(.*?)\n```", card, re.DOTALL).group(1))
    places = {licensed.name: str(licensed), out.name: str(out), "speech.wav": str(tmp_path / "speech.wav")}
    assert main([places.get(word, word) for word in command[1:]] + ["--max-seconds", "0.2"]) == 0
    assert (tmp_path / "speech.wav").stat().st_size > 44


def test_what_may_not_be_published_is_refused_whole(run: Path, tmp_path: Path):
    with pytest.raises(UserError) as refusal:
        export(run, tmp_path / "out", publish=Publishing("me/my-voice"))
    for problem in ("begins with higgs-audio-2", "--base OWNER/NAME", "licences found: none; expected Boson's"):
        assert problem in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_sent_to_the_hub(tiny_base: Path, tmp_path: Path, monkeypatch, capsys):
    """To a local stand-in of its HTTP interface, by the hub's own client."""
    write_adapter(tiny_base, tmp_path / "adapter", seed=1)
    licences = [str(tmp_path / "LICENSE"), str(tmp_path / "LLAMA_3_LICENSE")]
    for file in licences:
        Path(file).write_text("a licence")
    name = "me/higgs-audio-2-voice"
    flags = ["--push", name, "--base", RELEASED_REPOSITORY, "--licence-file", *licences]
    monkeypatch.setenv("NO_PROXY", "*")
    with serve_hub({}, inbox=tmp_path / "inbox") as stand_in:
        for token, out in ((False, "refused"), ("token", "out")):
            monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint=stand_in.url, token=token))
            status = main(["export", str(tmp_path / "adapter"), "-o", str(tmp_path / out), *flags])
            assert (status == 0) == bool(token), capsys.readouterr().err
    told = capsys.readouterr()
    assert f"on the hub: {name}" in told.out
    assert "huggingface-cli login" in told.err
    sent, made = tmp_path / "inbox" / name, tmp_path / "out"
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(sent) for path in sent.rglob("*") if path.is_file())
    assert all((sent / file).read_bytes() == (made / file).read_bytes() for file in files)
    assert json.loads((sent / "adapter_config.json").read_text())["base_model_name_or_path"] == RELEASED_REPOSITORY
    assert not [
        file for file in files if str(tmp_path).encode() in (sent / file).read_bytes() and "LIC" not in str(file)
    ]
