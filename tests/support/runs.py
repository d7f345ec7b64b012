"""A finished run's folder without its training: adapters with random weights, a config, made-up metrics."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from ds_higgs.adapters.whole import WholeInfo, write_whole
from ds_higgs.model.loading import load_model
from ds_higgs.model.lora import apply_lora
from ds_higgs.model.trained import TrainMode, make_trainable, trained_shapes

LAST_STEP = 10


def write_adapter(base: Path, folder: Path, *, seed: int) -> None:
    """A small adapter on `base` with weights large enough to matter."""
    torch.manual_seed(seed)
    model = apply_lora(
        load_model(base, dtype=torch.float32),
        rank=2,
        alpha=4,
        dropout=0.0,
        targets=["attention", "audio_ffn"],
        modules_to_save=["audio_head"],
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)


def write_run(folder: Path, base: Path, *, val_manifest: Path | None = None, **data: Any) -> None:
    """A run of the version before adapters had records: adapters of steps 5 and 10, a final one, its metrics.

    data: further keys of the configuration's data.
    """
    for name, seed in (("step-00000005", 5), ("step-00000010", 10), ("final", 10)):
        write_adapter(base, folder / "adapters" / name, seed=seed)
    config = {
        "run": {"output_dir": str(folder), "seed": 0},
        "model": {"base": str(base), "revision": None},
        "data": {
            "train_manifest": str(folder / "train.json"),
            "val_manifest": None if val_manifest is None else str(val_manifest),
            **data,
        },
        "loss": {"text_weight": 0.5, "audio_weight": 2.0},
        "optim": {"learning_rate": 0.005},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_metrics(folder / "metrics.jsonl")


def write_metrics(path: Path) -> None:
    """Steps 5 and 10, an evaluation at step 5, the end, and half a line."""
    lines: list[dict[str, Any]] = [
        {"event": "step", "step": step, "num_samples": 8, "num_audio_targets": 72_000, "loss": 9.0} for step in (5, 10)
    ]
    lines.append({"event": "eval", "step": 5, "loss": 7.0, "text_loss": 3.0, "audio_loss": 4.0})
    lines.append({"event": "end", "step": 10, "reason": "done"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "step", "st')


def write_whole_weights(base: Path, folder: Path, *, mode: TrainMode = "audio_path", seed: int = 0) -> None:
    """What a run of audio_path or full hands out, each weight near the base's, large enough a change to matter."""
    model = load_model(base, dtype=torch.float32)
    make_trainable(model, mode=mode, only=None, lora={})
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(
        folder,
        WholeInfo(mode=mode, base=str(base), revision=None),
        (
            (name, weight + 0.05 * torch.randn(weight.shape, generator=generator))
            for name, weight in model.named_parameters()
            if weight.requires_grad
        ),
        shapes=trained_shapes(model),
        dtype=torch.float32,
    )
