"""Validation loss of LoRA and of full training on the tiny base's random weights, at the same budget, for 3 seeds.

python benchmarks/modes.py     # example voices, 60 steps of 8 samples each; a few minutes on a CPU
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import describe_run, print_table, write_json

from ds_higgs.model.tiny import write_tiny_base

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "voice_cloning" / "config.yaml"
# The example's own settings, and what differs: LoRA has the head whole, since it can hardly steer a random one.
MODES = {
    "lora": {},
    "full": {"train.mode": "full", "lora.modules_to_save": "[]", "optim.learning_rate": "2e-3"},
    "audio_path": {"train.mode": "audio_path", "lora.modules_to_save": "[]", "optim.learning_rate": "2e-3"},
}


def train(folder: Path, base: Path, mode: str, *, seed: int, steps: int) -> dict[str, float]:
    """The losses of the last validation."""
    settings = {
        "run.output_dir": folder,
        "run.seed": seed,
        "run.max_steps": steps,
        "model.base": base,
        "data.cache_dir": folder.parent / "codes",
        "data.batch_size": 8,
        "eval.eval_steps": steps,
        "eval.num_audio_samples": 0,
        "checkpoint.save_steps": steps,
        "logging.tensorboard": "false",
        **MODES[mode],
    }
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    subprocess.run([sys.executable, "-m", "ds_higgs", "train", "-c", EXAMPLE, *flags], check=True, cwd=ROOT)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "eval"][-1]
    return {key: last[key] for key in ("loss", "text_loss", "audio_loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "modes.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(arguments.seeds):
            base = folder / f"base-{seed}"
            write_tiny_base(base, seed=seed)
            for mode in MODES:
                run = folder / f"{mode}-{seed}"
                losses = train(run, base, mode, seed=seed, steps=arguments.steps)
                rows.append({"seed": seed, "mode": mode, **losses})
    print_table(rows)
    write_json(arguments.output, {"run": describe_run(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
