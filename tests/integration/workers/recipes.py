"""Train every recipe for two steps on a tiny base, in this one process.

Usage: recipes.py BASE MANIFEST.json AUDIO_ROOT FOLDER
"""

import sys
from pathlib import Path

import torch

from ds_higgs.config.file import load_config
from ds_higgs.training.run import train
from tests.support.launching import ROOT


def main(base: str, manifest: str, audio_root: str, folder: str) -> None:
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        changes = {
            "run.output_dir": f"{folder}/{recipe.stem}",
            "run.max_steps": 2,
            "model.base": base,
            "data.train_manifest": manifest,
            "data.val_manifest": manifest,
            "data.audio_root": audio_root,
            "data.cache_dir": f"{folder}/codes",
            "data.num_workers": 0,
            "eval.num_audio_samples": 0,
            "eval.eval_steps": 2,
            "eval.max_batches": 1,
            "logging.tensorboard": False,
            "logging.progress": False,
            "optim.global_batch_size": 2,
        }
        if not torch.cuda.is_available():
            changes["model.quantization"] = None  # bitsandbytes has it on CUDA alone
        train(load_config(recipe, changes))


if __name__ == "__main__":
    main(*map(str, map(Path, sys.argv[1:])))
