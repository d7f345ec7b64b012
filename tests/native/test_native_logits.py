"""transformers' own HiggsAudioV2 gives the logits of boson's HiggsAudioModel, merged and with the adapter.

Needs a second environment, because boson_multimodal and transformers >= 5.3 exclude each other:

    python -m venv .venv-native
    .venv-native/bin/pip install torch==2.13.0
    .venv-native/bin/pip install "transformers>=5.3" peft
    DS_HIGGS_NATIVE_PYTHON=.venv-native/bin/python pytest tests/native
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_higgs.adapters.merging import load_adapter, merge_adapter
from ds_higgs.adapters.native import save_native_adapter, save_native_model
from ds_higgs.model.loading import HiggsAudioModel, load_model
from ds_higgs.model.lora import apply_lora

PYTHON = os.environ.get("DS_HIGGS_NATIVE_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="DS_HIGGS_NATIVE_PYTHON names no environment")

TOLERANCE = 1e-5
END_OF_TURN = 504
TEXT = [3, 40, 65, 20, 9]
AUDIO_IN_FRAMES, AUDIO_OUT_FRAMES = 12, 17
MAX_NEW_TOKENS = 30


@pytest.fixture(scope="module", params=[(), ("attention", "audio_ffn", "audio_norms")], ids=str)
def adapter(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With LoRA on all paths, and with parts of the layers trained whole in its place."""
    torch.manual_seed(1)
    model = apply_lora(
        load_model(tiny_base, dtype=torch.float32),
        rank=4,
        alpha=8,
        dropout=0.1,
        targets=[path for path in ("attention", "text_ffn", "audio_ffn") if path not in request.param],
        modules_to_save=["audio_head", "audio_embeddings", *request.param],
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def codes() -> torch.Tensor:
    """[codebooks, frames], the reference's frames before the target's."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 1024, (8, AUDIO_IN_FRAMES + AUDIO_OUT_FRAMES), generator=generator)


def prompt_ids(config) -> list[int]:
    return [*TEXT, config.audio_in_token_idx, *TEXT, config.audio_out_bos_token_id]


@torch.no_grad()
def boson_logits(model: HiggsAudioModel, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Text logits [seq, vocab], audio logits [audio-out frames, codebooks, codebook_size], expanded ids [seq]."""
    config = model.config
    input_ids = torch.tensor([[*prompt_ids(config), config.audio_out_token_idx, *TEXT]])
    outputs = model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        audio_in_ids=codes[:, :AUDIO_IN_FRAMES],
        audio_in_ids_start=torch.tensor([0]),
        audio_out_ids=codes[:, AUDIO_IN_FRAMES:],
        audio_out_ids_start=torch.tensor([0]),
        audio_out_ids_start_group_loc=torch.tensor([0]),
    )
    real = outputs.attention_mask[0].bool()
    is_audio = (outputs.audio_in_mask | outputs.audio_out_mask)[0, real]
    ids = outputs.expanded_input_ids[0, real].masked_fill(is_audio, config.audio_out_token_idx)
    return {"text": outputs.logits[0, real], "audio": outputs.audio_logits, "ids": ids}


@torch.no_grad()
def boson_greedy(model: HiggsAudioModel, codes: torch.Tensor) -> torch.Tensor:
    """[codebooks, steps]"""
    input_ids = torch.tensor([prompt_ids(model.config)])
    model.audio_out_bos_token_id = model.config.audio_out_bos_token_id
    model.audio_eos_token_id = model.config.audio_eos_token_id
    _, audio = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        audio_in_ids=codes[:, :AUDIO_IN_FRAMES],
        audio_in_ids_start=torch.tensor([0]),
        audio_out_ids=torch.zeros((0, 0), dtype=torch.long),
        audio_out_ids_start=torch.zeros(0, dtype=torch.long),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
    )
    return audio[0]


@pytest.fixture
def native_outputs(tmp_path: Path, codes: torch.Tensor) -> Callable[..., dict[str, torch.Tensor]]:
    def run(model: Path, expanded_ids: torch.Tensor, config, *options: str) -> dict[str, torch.Tensor]:
        in_prompt = len(prompt_ids(config)) - 1 + AUDIO_IN_FRAMES
        inputs = {
            "input_ids": expanded_ids.unsqueeze(0).contiguous(),
            "prompt_ids": expanded_ids[:in_prompt].unsqueeze(0).clone(),
            "audio_codes": codes,
            "max_new_tokens": torch.tensor(MAX_NEW_TOKENS),
        }
        save_file(inputs, tmp_path / "inputs.safetensors")
        script = Path(__file__).with_name("logits.py")
        files = [str(model), str(tmp_path / "inputs.safetensors"), str(tmp_path / "outputs.safetensors")]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([str(PYTHON), str(script), *files, *options], check=True, env=environment)
        return load_file(tmp_path / "outputs.safetensors")

    return run


def check_equal(native: dict[str, torch.Tensor], boson: dict[str, torch.Tensor], greedy: torch.Tensor) -> None:
    torch.testing.assert_close(native["text"], boson["text"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(native["audio"][AUDIO_IN_FRAMES:], boson["audio"], atol=TOLERANCE, rtol=0)
    steps = min(native["greedy"].shape[1], greedy.shape[1])
    assert steps > MAX_NEW_TOKENS // 2
    assert torch.equal(native["greedy"][:, :steps], greedy[:, :steps])


def test_merged_model(tiny_base, adapter, codes, native_outputs, tmp_path):
    peft_model = load_adapter(load_model(tiny_base, dtype=torch.float32), adapter)
    model = merge_adapter(peft_model, dtype=torch.float32).eval()
    save_native_model(model, tmp_path / "merged", eos_token_id=END_OF_TURN)
    boson = boson_logits(model, codes)
    native = native_outputs(tmp_path / "merged", boson["ids"], model.config)
    check_equal(native, boson, boson_greedy(model, codes))


def test_adapter(tiny_base, adapter, codes, native_outputs, tmp_path):
    base = load_model(tiny_base, dtype=torch.float32)
    save_native_model(base, tmp_path / "base", eos_token_id=END_OF_TURN)
    save_native_adapter(adapter, tmp_path / "native_adapter", base=str(tmp_path / "base"))
    model = load_adapter(base, adapter).eval().get_base_model()
    boson = boson_logits(model, codes)
    native = native_outputs(
        tmp_path / "base", boson["ids"], model.config, "--adapter", str(tmp_path / "native_adapter")
    )
    check_equal(native, boson, boson_greedy(model, codes))
