"""Loading a base checkpoint: what is refused, with which words, and that weights arrive unchanged."""

import json
import shutil
from pathlib import Path

import huggingface_hub.errors
import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from ds_higgs import hub
from ds_higgs.errors import UserError
from ds_higgs.hub import ORIGINAL_REVISION, RELEASED_REPOSITORY
from ds_higgs.model import loading
from ds_higgs.model.loading import HiggsAudioModel, load_model, load_tokenizer, resolve_base
from ds_higgs.model.tiny import write_tiny_base


@pytest.fixture
def base_copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_config(base: Path, **changes: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sharded_weights_are_loaded_and_a_lost_shard_is_reported(tiny_base: Path, base_copy: Path, capfd):
    model = load_model(tiny_base, dtype=torch.float32)
    (base_copy / "model.safetensors").unlink()
    model.save_pretrained(base_copy, max_shard_size="4MB")
    sharded = load_model(resolve_base(str(base_copy), None), dtype=torch.float32)
    assert capfd.readouterr().err == "", "a library's bar"
    assert all(torch.equal(weight, sharded.state_dict()[name]) for name, weight in model.state_dict().items())
    next(base_copy.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"model-00002.*cannot be read"):
        load_model(base_copy, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_in_the_dtype_asked_for(tiny_base: Path, dtype: torch.dtype):
    model = load_model(tiny_base, dtype=dtype)
    stored = load_file(tiny_base / "model.safetensors")
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name].to(dtype)) for name in stored)
    assert model.training


@pytest.mark.parametrize("whisper", [False, True])
def test_the_model_is_that_of_from_pretrained(tmp_path: Path, whisper: bool):
    write_tiny_base(tmp_path, whisper=whisper)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    model, usual = (
        load_model(tmp_path, dtype=torch.bfloat16),
        HiggsAudioModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, attn_implementation="sdpa"),
    )
    for kind in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(model, kind)()), dict(getattr(usual, kind)())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
            assert torch.equal(found[name], tensor), name
    assert model.config.to_dict() | {"_name_or_path": ""} == usual.config.to_dict() | {"_name_or_path": ""}
    assert (model.generation_config.temperature, model.generation_config.do_sample) == (0.25, True)


def test_nothing_of_a_model_for_a_device_stays_on_the_cpu(tiny_base: Path):
    model = load_model(tiny_base, dtype=torch.bfloat16, device="meta")
    places = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    assert places == {"meta"}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda base: (base / "config.json").unlink(), "has no config.json"),
        (lambda base: (base / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda base: (base / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda base: edit_config(base, model_type="llama"), "model_type is 'llama'"),
        (lambda base: (base / "model.safetensors").unlink(), "no weights"),
        (lambda base: (base / "generation_config.json").write_text('{"a'), "generation_config.json: cannot be read"),
        (
            lambda base: (base / "generation_config.json").write_text("[]"),
            "generation_config.json: expected a JSON obj",
        ),
    ],
)
def test_a_folder_without_a_higgs_checkpoint_is_refused(base_copy: Path, break_it, message: str):
    break_it(base_copy)
    with pytest.raises(UserError, match=message) as raised:
        resolve_base(str(base_copy), None)
    assert str(base_copy) in str(raised.value)


@pytest.mark.parametrize("value", [5, [], {"rope_scaling": 5}])
def test_a_config_that_makes_no_model_is_refused(base_copy: Path, value):
    edit_config(base_copy, text_config=value)
    with pytest.raises(UserError, match=r"config\.json: (text_config is|not the config of)"):
        load_tokenizer(base_copy)


def test_truncated_weights_are_refused(base_copy: Path):
    weights = base_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match="weights cannot be read"):
        load_model(base_copy, dtype=torch.float32)


def test_weights_that_do_not_fit_are_all_reported(base_copy: Path):
    weights = load_file(base_copy / "model.safetensors")
    del weights["layers.1.audio_mlp.up_proj.weight"]
    weights["norm.weight"] = torch.ones(3)
    weights["stray.weight"] = torch.ones(3)
    save_file(weights, base_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as raised:
        load_model(base_copy, dtype=torch.float32)
    message = str(raised.value)
    assert "missing: layers.1.audio_mlp.up_proj.weight" in message
    assert "norm.weight: found shape (3,), expected (128,)" in message
    assert "not in the model: stray.weight" in message


def test_the_class_is_checked_before_weights_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Fork:
        def forward(self, input_ids, labels): ...

    monkeypatch.setattr(loading, "HiggsAudioModel", Fork)
    with pytest.raises(UserError, match="`labels`"):
        load_model(tmp_path / "not-there", dtype=torch.float32)


def test_tokenizer_and_config_have_to_agree(base_copy: Path):
    edit_config(base_copy, audio_out_token_idx=7)
    with pytest.raises(UserError, match="audio_out_token_idx = 7"):
        load_tokenizer(base_copy)


def test_missing_tokenizer_is_refused(base_copy: Path):
    for file in base_copy.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer is missing"):
        load_tokenizer(base_copy)


def test_unreadable_tokenizer_is_refused(base_copy: Path):
    (base_copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(base_copy)


@pytest.mark.parametrize(("asked", "used"), [(None, ORIGINAL_REVISION), ("main", "main")])
def test_the_released_repository_is_pinned(
    monkeypatch: pytest.MonkeyPatch, tiny_base: Path, asked: str | None, used: str
):
    calls = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **kwargs: calls.append((name, kwargs["revision"])) or tiny_base
    )
    assert resolve_base(RELEASED_REPOSITORY, asked) == tiny_base
    assert calls == [(RELEASED_REPOSITORY, used)]


def http_error(kind: type[Exception]) -> Exception:
    response = requests.Response()
    response.status_code = 404
    return kind("404", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (huggingface_hub.errors.HFValidationError("bad name"), "not a hub repository's name"),
        (http_error(huggingface_hub.errors.RevisionNotFoundError), "has no revision"),
        (http_error(huggingface_hub.errors.GatedRepoError), "is gated"),
        (http_error(huggingface_hub.errors.RepositoryNotFoundError), "does not exist on the hub"),
        (huggingface_hub.errors.LocalEntryNotFoundError("offline"), "cannot be downloaded"),
        (requests.ConnectionError("no route"), "cannot be downloaded"),
    ],
)
def test_download_failures_name_what_was_looked_for(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message) as raised:
        resolve_base("somebody/nothing", None)
    assert "somebody/nothing" in str(raised.value)
