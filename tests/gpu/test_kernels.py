"""On a CUDA device: Liger, FlashAttention-2 and nf4 against torch's own, on the tiny model."""

import importlib.util
from pathlib import Path

import pytest
import torch

from ds_higgs.model.loading import load_model
from ds_higgs.model.lora import apply_lora
from ds_higgs.model.patches import apply_patches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def run_text(base: Path, *, dtype: torch.dtype, attention: str = "sdpa", quantization: str | None = None, **patches):
    """Logits [2, 24, vocab] and LoRA gradients of a text batch with one audio segment."""
    torch.manual_seed(0)
    model = load_model(base, dtype=dtype, attention=attention, quantization=quantization)
    apply_lora(model, rank=4, alpha=8, dropout=0.0, targets=("attention", "text_ffn", "audio_ffn"))
    settings = {"packed_rows": True, "kernels": "torch", "activation_checkpointing": None} | patches
    apply_patches(model, **settings)
    model.cuda()
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    ids[0, 5] = model.config.audio_out_token_idx
    codes = torch.randint(0, 1024, (8, 11), generator=torch.Generator().manual_seed(2))
    outputs = model(
        input_ids=ids.cuda(),
        attention_mask=torch.ones_like(ids).cuda(),
        audio_out_ids=codes.cuda(),
        audio_out_ids_start=torch.tensor([0]).cuda(),
        use_cache=False,
    )
    real = outputs.attention_mask.bool()
    (outputs.logits[real].float().logsumexp(-1).mean() + outputs.audio_logits.logsumexp(-1).mean()).backward()
    grads = [parameter.grad.float() for parameter in model.parameters() if parameter.requires_grad]
    return outputs.logits[real].float().detach(), torch.cat([grad.flatten() for grad in grads])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@needs("liger_kernel")
@pytest.mark.parametrize("packed_rows", [False, True])
def test_liger_in_fp32(tiny_base: Path, packed_rows: bool):
    expected = run_text(tiny_base, dtype=torch.float32, packed_rows=packed_rows)
    found = run_text(tiny_base, dtype=torch.float32, packed_rows=packed_rows, kernels="liger")
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-4


@needs("liger_kernel")
def test_liger_in_bf16_is_as_near_to_fp32_as_torch_is(tiny_base: Path):
    exact = run_text(tiny_base, dtype=torch.float32)
    plain = run_text(tiny_base, dtype=torch.bfloat16)
    liger = run_text(tiny_base, dtype=torch.bfloat16, kernels="liger")
    assert relative_error(liger[0], exact[0]) < 1.3 * relative_error(plain[0], exact[0])


@needs("flash_attn")
@pytest.mark.parametrize("packed_rows", [False, True])
def test_flash_attention_2_is_as_near_to_fp32_as_sdpa_is(tiny_base: Path, packed_rows: bool):
    exact = run_text(tiny_base, dtype=torch.float32)
    sdpa = run_text(tiny_base, dtype=torch.bfloat16, packed_rows=packed_rows)
    flash = run_text(tiny_base, dtype=torch.bfloat16, attention="flash_attention_2", packed_rows=packed_rows)
    assert relative_error(flash[0], exact[0]) < 1.3 * relative_error(sdpa[0], exact[0])


@needs("bitsandbytes")
def test_nf4_base_gives_gradients_near_the_exact_ones(tiny_base: Path):
    exact = run_text(tiny_base, dtype=torch.bfloat16)
    four_bit = run_text(tiny_base, dtype=torch.bfloat16, quantization="nf4")
    assert relative_error(four_bit[0], exact[0]) < 0.3
    assert torch.isfinite(four_bit[1]).all()


def test_packed_rows_on_cuda_in_fp32(tiny_base: Path):
    expected = run_text(tiny_base, dtype=torch.float32, packed_rows=False)
    found = run_text(tiny_base, dtype=torch.float32, packed_rows=True, activation_checkpointing=1)
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-4
