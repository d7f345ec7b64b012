"""Adapters arrive unchanged, and a merged model speaks as the unmerged one does."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ds_higgs.adapters.merging import ADAPTER_WEIGHTS, load_adapter, merge_adapter
from ds_higgs.adapters.scaling import scale_adapter
from ds_higgs.errors import UserError
from ds_higgs.model.loading import load_model
from ds_higgs.model.lora import apply_lora

LAYERS = ("audio_ffn", "audio_norms", "audio_embeddings")


def build_trained(
    tiny_base: Path, *, dtype: torch.dtype = torch.float32, dora: bool = False, whole: tuple[str, ...] = ()
) -> PeftModel:
    """A PeftModel with large random adapters, so that a wrong merge shows.

    whole: parts that are trained whole beside the audio head, instead of with LoRA.
    """
    torch.manual_seed(1)
    model = apply_lora(
        load_model(tiny_base, dtype=dtype),
        rank=4,
        alpha=8,
        dropout=0.1,
        targets=[path for path in ("attention", "text_ffn", "audio_ffn") if path not in whole],
        modules_to_save=["audio_head", *whole],
        dora=dora,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@torch.no_grad()
def compute_logits(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Text logits [1, seq, vocab] and audio logits [frames, codebooks, codebook_size] of a fixed input."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.tensor([[3, 40, 508, 511, 507, 9, 504]])
    outputs = model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        audio_out_ids=torch.randint(0, 1024, (8, 21), generator=generator),
        audio_out_ids_start=torch.tensor([0]),
        audio_out_ids_start_group_loc=torch.tensor([0]),
    )
    return outputs.logits.float(), outputs.audio_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_arrives_unchanged(tiny_base: Path, tmp_path: Path, dtype: torch.dtype):
    trained = build_trained(tiny_base, dtype=dtype)
    trained.save_pretrained(tmp_path)
    loaded = load_adapter(load_model(tiny_base, dtype=dtype), tmp_path).eval()
    for name, weight in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(loaded.state_dict()[name].dtype)), name


@pytest.mark.parametrize("variant", [{}, {"dora": True}, {"whole": LAYERS}], ids=str)
def test_the_merged_model_gives_the_unmerged_logits(tiny_base: Path, variant: dict):
    trained = build_trained(tiny_base, **variant)
    expected = compute_logits(trained)
    base_logits = compute_logits(load_model(tiny_base, dtype=torch.float32).eval())
    assert (expected[1] - base_logits[1]).abs().max() > 0.1, "the adapter has to matter"
    merged = merge_adapter(trained, dtype=torch.float32)
    for got, want in zip(compute_logits(merged), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == load_file(tiny_base / "model.safetensors").keys()


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("variant", [{}, {"dora": True}, {"whole": LAYERS}], ids=str)
def test_a_scaled_adapter_is_the_same_at_run_time_merged_and_saved(
    tiny_base: Path, tmp_path: Path, variant: dict, scale: float
):
    scaled = build_trained(tiny_base, **variant)
    full = compute_logits(scaled)
    scale_adapter(scaled, scale)
    run_time = compute_logits(scaled)
    scaled.save_pretrained(tmp_path)
    saved = compute_logits(load_adapter(load_model(tiny_base, dtype=torch.float32), tmp_path).eval())
    merged = compute_logits(merge_adapter(scaled, dtype=torch.float32))
    base = compute_logits(load_model(tiny_base, dtype=torch.float32).eval())
    for at_run_time, of_saved, of_merged, of_base, of_full in zip(run_time, saved, merged, base, full, strict=True):
        assert torch.equal(of_saved, at_run_time)
        torch.testing.assert_close(of_merged, at_run_time, atol=1e-5 if variant else 1e-6, rtol=1e-5)
        assert torch.equal(at_run_time, of_base) == torch.equal(of_merged, of_base) == (scale == 0)
        assert not torch.equal(at_run_time, of_full)


def test_half_an_adapter_adds_half(tiny_base: Path):
    """In the weights: LoRA's update, and a module that was trained whole."""
    base = load_model(tiny_base, dtype=torch.float32).state_dict()
    full = merge_adapter(build_trained(tiny_base), dtype=torch.float32).state_dict()
    half = build_trained(tiny_base)
    scale_adapter(half, 0.5)
    for name, weight in merge_adapter(half, dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(weight, (base[name] + full[name]) / 2, atol=1e-6, rtol=0)


def test_a_bf16_merge_rounds_once(tiny_base: Path):
    exact = merge_adapter(build_trained(tiny_base), dtype=torch.float32).state_dict()
    rounded = merge_adapter(build_trained(tiny_base), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in exact.items())


def test_an_adapter_for_another_architecture_is_refused(tiny_base: Path, tmp_path: Path):
    build_trained(tiny_base).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    lost = next(name for name in tensors if name.endswith("lora_B.weight"))
    renamed = {name.replace(lost, lost.replace("layers.", "blocks.")): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="does not fit the base checkpoint"):
        load_adapter(load_model(tiny_base, dtype=torch.float32), tmp_path)


def test_a_folder_that_is_no_lora_adapter_is_refused(tiny_base: Path, tmp_path: Path):
    model = load_model(tiny_base, dtype=torch.float32)
    with pytest.raises(UserError, match="not an adapter"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    save_file({}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="peft_type is 'IA3'"):
        load_adapter(model, tmp_path)
