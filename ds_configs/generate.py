"""Write the ready DeepSpeed JSON files of this folder: `python ds_configs/generate.py`."""

import json
from pathlib import Path
from typing import Any

from ds_higgs.config import Config
from ds_higgs.training.zero import build_deepspeed_config

FOLDER = Path(__file__).parent
ZERO_SETTINGS: dict[str, dict[str, Any]] = {
    "zero1_bf16.json": {"stage": 1},
    "zero2_bf16.json": {"stage": 2},
    "zero2_bf16_offload_optimizer.json": {"stage": 2, "offload_optimizer": True},
    "zero3_bf16.json": {"stage": 3},
}


def render(name: str) -> str:
    """The text of one file: the defaults, 8 accumulation steps."""
    config = Config.model_validate(
        {
            "run": {"output_dir": "out"},
            "model": {"base": "bosonai/higgs-audio-v2-generation-3B-base"},
            "data": {"train_manifest": "train.json"},
            "optim": {"gradient_accumulation_steps": 8},
            "zero": ZERO_SETTINGS[name],
            "logging": {"tensorboard": False},
        }
    )
    return json.dumps(build_deepspeed_config(config), indent=2) + "\n"


if __name__ == "__main__":
    for file_name in ZERO_SETTINGS:
        (FOLDER / file_name).write_text(render(file_name), encoding="utf-8")
