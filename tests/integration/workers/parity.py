"""Train one global batch with DeepSpeed in many settings; rank 0 saves norms, losses and weights of each.

Usage: parity.py BASE OUTPUT.pt SETTINGS.json   (a list of {name, scenario, accumulation, zero: {...}})
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.training.engine import build_engine
from ds_higgs.training.train_step import LossWeights, train_step
from ds_higgs.training.zero import build_deepspeed_config
from tests.support.parity import STEPS, build_model, micro_batches, parity_config, trainable


def run_setting(setting: dict, base: Path, ranks: distributed.Ranks) -> dict:
    config = parity_config(base, **setting["zero"])
    config = config.model_copy(
        update={"optim": config.optim.model_copy(update={"gradient_accumulation_steps": setting["accumulation"]})}
    )
    model = build_model(config)
    engine = build_engine(config, model, deepspeed_config=build_deepspeed_config(config), total_steps=10, ranks=ranks)
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)
    everything = micro_batches(base, setting["scenario"], count=ranks.world_size * setting["accumulation"])
    own = everything[ranks.rank :: ranks.world_size]
    results = [train_step(engine, own, weights) for _ in range(STEPS)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(parameters, enabled=config.zero.stage == 3):
        weights_now = trainable(model)
    engine.destroy()
    return {
        "grad_norms": [result.grad_norm for result in results],
        "losses": [result.loss for result in results],
        "text_losses": [result.text_loss for result in results],
        "audio_losses": [result.audio_loss for result in results],
        "weights": weights_now,
    }


def main() -> None:
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    base, output, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    ranks = distributed.init_process_group()
    results = {}
    for setting in settings:
        results[setting["name"]] = run_setting(setting, base, ranks)
    if ranks.is_main:
        torch.save(results, output)
    distributed.destroy_process_group()


run_and_exit(main)
