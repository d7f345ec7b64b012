"""Runs that train whole weights end to end: what they change and what they must not, what they leave, and going on."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ds_higgs.adapters.opening import open_adapter
from ds_higgs.commands.export import export
from ds_higgs.model.loading import load_model
from ds_higgs.model.trained import select_weights
from tests.faults.job import write_config
from tests.faults.scenarios import change_the_number_of_ranks, resume_is_exact
from tests.support import launching

TEXT = {"input_ids": torch.arange(40).view(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
QUICK = {
    "run": {"max_steps": 2},
    "lora": {"rank": 16, "dropout": 0.05},  # what is of no use in these modes has to stand at its default
    "checkpoint": {"save_steps": 2},
    "data": {"num_workers": 0},
    "optim": {"learning_rate": 2e-2, "warmup_steps": 0},  # enough for a step of bf16 near 1
}


def train(folder: Path, base: Path, *, ranks: int, mode: str, **overrides: dict) -> Path:
    config = write_config(folder, base, train={"mode": mode}, **{**QUICK, **overrides})
    done = launching.run_ranks(ranks, "-m", "ds_higgs", "train", "-c", config)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder / "run"


@torch.no_grad()
def text_logits(base: Path) -> torch.Tensor:
    return load_model(base, dtype=torch.bfloat16).eval()(**TEXT, use_cache=False).logits


@pytest.mark.parametrize(
    ("stage", "ranks"), [(3, 2), *(pytest.param(stage, 2, marks=pytest.mark.slow) for stage in (0, 1, 2))]
)
def test_an_audio_path_run_changes_the_audio_path_and_nothing_else(tmp_path, tiny_base, stage, ranks):
    """Exported from the checkpoint's shards and from what the run hands out: the same model."""
    run_dir = train(tmp_path, tiny_base, ranks=ranks, mode="audio_path", zero={"stage": stage})
    base = load_model(tiny_base, dtype=torch.bfloat16)
    audio_path = set(select_weights(base, mode="audio_path"))
    handed_out = load_file(run_dir / "adapters" / "final" / "trained.safetensors")
    assert handed_out.keys() == audio_path

    export(run_dir / "checkpoints" / "step-00000002", tmp_path / "model", merge=True)
    exported = load_model(tmp_path / "model", dtype=torch.bfloat16).state_dict()
    for name, weight in base.state_dict().items():
        assert torch.equal(exported[name], weight) == (name not in audio_path), name
    assert all(torch.equal(exported[name], weight) for name, weight in handed_out.items())
    assert torch.equal(text_logits(tmp_path / "model"), text_logits(tiny_base))


# LoRA on one part, and others trained whole.
BESIDE_LORA = {
    "lora": {
        "targets": ["attention"],
        "modules_to_save": ["audio_ffn", "audio_norms", "audio_head", "audio_embeddings"],
    },
    "optim": {"learning_rate": 2e-2, "whole_learning_rate": 1e-2, "warmup_steps": 0, "ema_decay": 0.9},
}
LEARNS = re.compile(r"layers\.\d+\.self_attn\.[qkvo]_proj|layers\.\d+\.audio_.*|audio_codebook_.*|.*audio_lm_head.*")


@pytest.mark.parametrize(
    ("stage", "ranks"), [(3, 2), *(pytest.param(stage, 2, marks=pytest.mark.slow) for stage in (0, 1, 2))]
)
def test_a_run_of_lora_beside_whole_weights_changes_these_and_nothing_else(tmp_path, tiny_base, stage, ranks):
    """What it hands out is in its checkpoint, is PEFT's own form, and is the merged model, in fp32 to rounding."""
    zero = {"stage": stage, "precision": "fp32"}
    run_dir = train(tmp_path, tiny_base, ranks=ranks, mode="lora", zero=zero, **BESIDE_LORA)
    final, checkpoint = run_dir / "adapters" / "final", run_dir / "checkpoints" / "step-00000002"
    handed_out = load_file(final / "adapter_model.safetensors")
    export(checkpoint, tmp_path / "adapter")
    of_checkpoint = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    averaged = load_file(final / "ema" / "adapter_model.safetensors")
    assert of_checkpoint.keys() == handed_out.keys() == averaged.keys()
    for name, weight in handed_out.items():
        assert torch.equal(of_checkpoint[name], weight), name
        assert not torch.equal(averaged[name], weight), name
    assert "trained whole beside LoRA: audio\\_ffn, audio\\_norms" in (tmp_path / "adapter" / "README.md").read_text()

    export(run_dir, tmp_path / "model", merge=True, precision="fp32")
    base, merged = (load_model(folder, dtype=torch.float32) for folder in (tiny_base, tmp_path / "model"))
    of_base = base.state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(of_base[name], weight) == (not LEARNS.match(name)), name
    by_peft = PeftModel.from_pretrained(base.eval(), tmp_path / "adapter").eval()
    for found, expected in zip(logits(by_peft), logits(merged.eval()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    export(run_dir, tmp_path / "native", merge=True, precision="fp32", layout="transformers")
    for name, weight in load_model(tmp_path / "native", dtype=torch.float32).state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name]), name


@torch.no_grad()
def logits(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Of text, and of 21 frames."""
    codes = torch.randint(0, 1024, (8, 21), generator=torch.Generator().manual_seed(2))
    places = {"audio_out_ids_start": torch.tensor([0]), "audio_out_ids_start_group_loc": torch.tensor([0])}
    input_ids = torch.tensor([[3, 40, 508, 511, 507, 9, 504]])
    outputs = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), audio_out_ids=codes, **places)
    return outputs.logits, outputs.audio_logits


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_full_run_hands_out_what_is_in_its_checkpoint(tmp_path, tiny_base, stage):
    run_dir = train(tmp_path, tiny_base, ranks=2, mode="full", zero={"stage": stage})
    names = set(load_model(tiny_base, dtype=torch.bfloat16).state_dict())
    with open_adapter(run_dir) as final, open_adapter(run_dir / "checkpoints" / "step-00000002") as checkpoint:
        assert final.whole.shapes.keys() == checkpoint.whole.shapes.keys() == names
        for name in names:
            assert torch.equal(final.whole.read(name), checkpoint.whole.read(name).bfloat16()), name


WAYS = {
    "audio_path": {"train": {"mode": "audio_path"}, "lora": QUICK["lora"]},
    "full": {"train": {"mode": "full"}, "lora": QUICK["lora"]},
    "beside LoRA": {"lora": BESIDE_LORA["lora"], "optim": {"whole_learning_rate": 1e-4, "ema_decay": 0.9}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [(stage, precision, False) for stage in (0, 1, 2, 3) for precision in ("bf16", "fp32")]
    + [(stage, "bf16", True) for stage in (1, 2, 3)],
)
@pytest.mark.parametrize("way", WAYS)
def test_resume_is_exact(tmp_path, tiny_base, way, stage, precision, offload):
    of_way = WAYS[way]
    settings = {
        **of_way,
        "optim": {**of_way.get("optim", {}), "gradient_accumulation_steps": 2},
        "zero": {"stage": stage, "precision": precision, "offload_optimizer": offload},
    }
    resume_is_exact(tmp_path / "run", tiny_base, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("ranks", "other_ranks", "stage"),
    [(*ranks, stage) for stage in (1, 2, 3) for ranks in [(2, 1), (1, 2), (2, 3)]],
)
def test_another_number_of_ranks_goes_on_as_if_it_had_not_changed(tmp_path, tiny_base, way, ranks, other_ranks, stage):
    settings = {**WAYS[way], "lora": {"dropout": 0.0, **WAYS[way]["lora"]}}
    difference = change_the_number_of_ranks(tmp_path / "run", tiny_base, ranks, other_ranks, stage=stage, **settings)
    assert difference < 1e-6
