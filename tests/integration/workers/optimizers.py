"""Train the whole tiny model by another optimizer at several stages; save half-way, go on, and go on from the save.

Usage: optimizers.py BASE FOLDER SETTINGS.json   (a list of {"name", "optim", "zero"})

Rank 0 saves losses and trained weights of each setting to FOLDER/results.pt.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed import DeepSpeedEngine

from ds_higgs.checkpoint import load_checkpoint, save_checkpoint
from ds_higgs.config import Config, OptimConfig
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.losses import LossWeights
from ds_higgs.training.engine import build_engine
from ds_higgs.training.train_step import train_step
from ds_higgs.training.zero import build_deepspeed_config
from tests.support.parity import build_model, micro_batches, parity_config

STEPS = 3
WEIGHTS = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)


def run_setting(setting: dict, base: Path, folder: Path, ranks: distributed.Ranks) -> dict:
    config = parity_config(base, train={"mode": "full"}, optim=setting["optim"], **setting["zero"])
    batches = micro_batches(base, "all audio", count=ranks.world_size)[ranks.rank :: ranks.world_size]
    engine = start(config, ranks)
    losses = train(engine, batches)
    weights = whole_weights(engine)
    contents = {"state": {}, "rank_state": {"nothing": 0}}
    path = save_checkpoint(engine, folder / setting["name"], keep_latest=1, step=STEPS, **contents)
    further = train(engine, batches)
    engine.destroy()
    again = start(config, ranks)
    load_checkpoint(again, path)
    goes_on_exactly = train(again, batches) == further
    again.destroy()
    return {"losses": losses + further, "weights": weights, "goes_on_exactly": goes_on_exactly}


def start(config: Config, ranks: distributed.Ranks) -> DeepSpeedEngine:
    options = {"deepspeed_config": build_deepspeed_config(config), "total_steps": 10, "ranks": ranks}
    anywhere = config.model_copy(update={"optim": OptimConfig()})  # a run takes adamw_8bit on a GPU alone
    return build_engine(config, build_model(anywhere), **options)


def train(engine: DeepSpeedEngine, batches: list) -> list[float]:
    return [train_step(engine, batches, WEIGHTS).loss for _ in range(STEPS)]


def whole_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.higgs.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            if parameter.requires_grad:
                found[name] = parameter.detach().float().clone()
    return found


def main() -> None:
    torch.compiler.set_stance("force_eager")  # Muon's kernels: compiled, they take a minute
    base, folder, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    ranks = distributed.init_process_group()
    results = {setting["name"]: run_setting(setting, base, folder, ranks) for setting in settings}
    if ranks.is_main:
        torch.save(results, folder / "results.pt")
    distributed.destroy_process_group()


run_and_exit(main)
