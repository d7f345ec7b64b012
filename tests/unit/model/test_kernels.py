"""Choosing kernels, and that Liger's reach every norm and both feed-forward paths with the right arguments."""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ds_higgs.errors import UserError
from ds_higgs.model import quantization
from ds_higgs.model.kernels import choose_attention, choose_compiled, choose_kernels, liger_rotate
from ds_higgs.model.layer_kernels import build_layer_kernels
from ds_higgs.model.lora import unwrap
from ds_higgs.model.patches import apply_patches
from ds_higgs.model.quantization import UNQUANTIZED_MODULES, build_quantization_config, check_quantization
from tests.support.gradients import assert_same_training


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The optional packages that seem to be installed; empty at first."""
    packages: set[str] = set()

    def find_spec(name: str):
        return ModuleSpec(name, None, origin=name) if name in packages else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return packages


@pytest.fixture
def liger_in_torch(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """liger_kernel's functional interface written in torch; counts its calls."""
    calls = {"rms_norm": 0, "swiglu": 0, "rope": 0}

    def liger_rms_norm(x, weight, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        calls["rms_norm"] += 1
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    def liger_swiglu(gate, up):
        calls["swiglu"] += 1
        return nn.functional.silu(gate) * up

    def liger_rope(query, key, cos, sin):
        assert query.shape[0] == key.shape[0] == cos.shape[0] == 1  # [1, heads, rows, head_dim], [1, rows, head_dim]
        assert query.shape[2:] == key.shape[2:] == cos.shape[1:] == sin.shape[1:]
        calls["rope"] += 1
        return apply_rotary_pos_emb(query, key, cos, sin)

    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_rms_norm, functional.liger_swiglu, functional.liger_rope = liger_rms_norm, liger_swiglu, liger_rope
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    return calls


def test_auto_kernels_need_the_package_and_cuda(installed):
    assert choose_kernels("auto", device_type="cuda") == "torch"
    installed.add("liger_kernel")
    assert choose_kernels("auto", device_type="cuda") == "liger"
    assert choose_kernels("auto", device_type="cpu") == "torch"
    assert choose_kernels("liger", device_type="cuda") == "liger"
    assert choose_kernels("torch", device_type="cuda") == "torch"


@pytest.mark.parametrize(("device", "package"), [("cpu", "liger_kernel"), ("cuda", "something_else")])
def test_liger_where_it_cannot_work_is_refused(installed, device, package):
    installed.add(package)
    with pytest.raises(UserError, match=r"memory\.kernels"):
        choose_kernels("liger", device_type=device)


def test_compilation_is_for_torchs_kernels_on_cuda(installed):
    assert not choose_compiled("auto", kernels="torch", device_type="cuda")  # no triton
    installed.add("triton")
    assert choose_compiled("auto", kernels="torch", device_type="cuda")
    assert not choose_compiled("auto", kernels="liger", device_type="cuda")
    assert not choose_compiled("auto", kernels="torch", device_type="cpu")
    assert not choose_compiled("off", kernels="torch", device_type="cuda")


def test_attention_choice(installed):
    bf16 = torch.bfloat16
    assert choose_attention("auto", device_type="cuda", dtype=bf16) == "sdpa"
    with pytest.raises(UserError) as raised:
        choose_attention("flash_attention_2", device_type="cpu", dtype=torch.float32)
    assert all(part in str(raised.value) for part in ("CUDA device, found cpu", "not installed", "found float32"))
    installed.add("flash_attn")
    assert choose_attention("flash_attention_2", device_type="cuda", dtype=bf16) == "flash_attention_2"


def test_variable_length_attention_says_all_that_is_in_the_way(monkeypatch):
    bf16 = torch.bfloat16
    with pytest.raises(UserError) as raised:
        choose_attention("varlen", device_type="cpu", dtype=torch.float32, packed_rows=False)
    parts = ("CUDA device, found cpu", "memory.packed_rows: true", "found float32")
    assert all(part in str(raised.value) for part in parts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"compute capability 8\.0"):
        choose_attention("varlen", device_type="cuda", dtype=bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_attention("varlen", device_type="cuda", dtype=bf16) == "varlen"
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value, is_causal: None)
    with pytest.raises(UserError, match=r"needs torch\.nn\.attention\.varlen with shared heads, found torch"):
        choose_attention("varlen", device_type="cuda", dtype=bf16)


def test_variable_length_attention_needs_rows_that_can_be_packed(lora_model):
    model = unwrap(lora_model())
    model.config.text_config.hidden_act = "gelu"
    with pytest.raises(UserError, match=r"memory\.attention: varlen needs packed rows"):
        apply_patches(model, packed_rows=True, kernels="torch", activation_checkpointing=None, varlen=True)


@pytest.mark.parametrize("odd_inputs", ["unequal_lengths", "no_audio", "one_left_padded"], indirect=True)
@pytest.mark.parametrize("packed", [False, True])
def test_liger_reaches_every_norm_and_both_paths(lora_model, loss_and_grads, odd_inputs, liger_in_torch, packed):
    stock, patched = unwrap(lora_model()), unwrap(lora_model())
    apply_patches(patched, packed_rows=packed, kernels="liger", activation_checkpointing=None)
    assert_same_training(loss_and_grads(stock, odd_inputs), loss_and_grads(patched, odd_inputs))
    layers = len(stock.layers)
    assert liger_in_torch == {"rms_norm": 4 * layers + 1, "swiglu": 2 * layers, "rope": layers if packed else 0}


def test_rotations_agree(liger_in_torch):
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (torch.randn(7, *rest, generator=generator) for rest in ((4, 32), (2, 32), (32,), (32,)))
    plain_rotate = build_layer_kernels("plain", compiled=False).rotate
    for one, other in zip(liger_rotate(query, key, cos, sin), plain_rotate(query, key, cos, sin), strict=True):
        assert torch.equal(one, other)


def test_patches_work_in_the_order_that_apply_patches_takes(lora_model, loss_and_grads, odd_inputs):
    patched, stock = unwrap(lora_model()), unwrap(lora_model())
    apply_patches(patched, packed_rows=True, kernels="torch", activation_checkpointing=2)
    torch.testing.assert_close(
        loss_and_grads(patched, odd_inputs)[0], loss_and_grads(stock, odd_inputs)[0], rtol=1e-6, atol=0
    )


def test_no_patch_leaves_the_model_as_it_was(lora_model):
    model = unwrap(lora_model())
    apply_patches(model, packed_rows=False, kernels="torch", activation_checkpointing=None)
    assert not [module for module in model.modules() if "forward" in module.__dict__]
    assert "_forward_core" not in model.__dict__


def test_quantization_says_all_that_is_in_the_way(installed):
    check_quantization(None, device_type="cpu", zero_stage=3)
    with pytest.raises(UserError) as raised:
        check_quantization("nf4", device_type="cpu", zero_stage=3)
    assert all(part in str(raised.value) for part in ("found cpu", "bitsandbytes is not installed", "zero.stage 3"))
    installed.add("bitsandbytes")
    check_quantization("nf4", device_type="cuda", zero_stage=2)


def test_fp8_says_all_that_is_in_the_way(monkeypatch):
    with pytest.raises(UserError) as raised:
        check_quantization("fp8", device_type="cpu", zero_stage=3, dtype=torch.float32)
    for part in (
        "CUDA device, found cpu",
        r"stage 3 cannot split fp8 weights",
        "needs bf16 (zero.precision), found float32",
    ):
        assert part in str(raised.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"compute capability 8\.9 or higher \(Ada, Hopper\), found 8\.0"):
        check_quantization("fp8", device_type="cuda", zero_stage=2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_quantization("fp8", device_type="cuda", zero_stage=2)
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    with pytest.raises(UserError, match=r"needs torch\.nn\.functional\.scaled_mm, found torch"):
        check_quantization("fp8", device_type="cuda", zero_stage=2)


def test_quantization_config_keeps_the_heads(monkeypatch, lora_model):
    monkeypatch.setattr(quantization.BitsAndBytesConfig, "post_init", lambda self: None)  # asks for the package
    config = build_quantization_config("nf4", dtype=torch.bfloat16)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert set(config.llm_int8_skip_modules) == set(UNQUANTIZED_MODULES)
    assert hasattr(unwrap(lora_model()), "audio_decoder_proj")
    assert build_quantization_config(None, dtype=torch.bfloat16) is None
