"""Train one global batch with DeepSpeed in many settings; rank 0 saves norms, losses and weights of each.

Usage: parity.py BASE OUTPUT.pt SETTINGS.json   (a list of `Setting`s of test_gradient_parity.py)
"""

import json
import sys
from itertools import chain
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param

from ds_higgs.batch import Batch
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.losses import LossWeights
from ds_higgs.training.engine import build_engine
from ds_higgs.training.train_step import train_step
from ds_higgs.training.validation import evaluate
from ds_higgs.training.zero import build_deepspeed_config, splits_from_the_start
from tests.support.parity import KEPT, LANDMARKS, STEPS, build_model, micro_batches, parity_config, trainable


def run_setting(setting: dict, base: Path, ranks: distributed.Ranks) -> dict:
    sections = {section: setting[section] for section in ("train", "lora", "optim", "keep")}
    config = parity_config(base, **sections, **setting["zero"])
    config = config.model_copy(
        update={"optim": config.optim.model_copy(update={"gradient_accumulation_steps": setting["accumulation"]})}
    )
    deepspeed_config = build_deepspeed_config(config)
    model = build_model(config, split_by=deepspeed_config if splits_from_the_start(deepspeed_config) else None)
    initial = trainable(model)
    engine = build_engine(config, model, deepspeed_config=deepspeed_config, total_steps=10, ranks=ranks)
    masters = master_weights(engine)
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)
    own = own_batches(setting, base, ranks)
    fresh = not engine.optimizer.state and all(torch.equal(masters[name], initial[name].float()) for name in initial)
    results = [train_step(engine, own, weights, keep=KEPT if setting["keep"] else None) for _ in range(STEPS)]
    found = {
        "fresh": fresh,
        "grad_norms": [result.grad_norm for result in results],
        "losses": [result.loss for result in results],
        "loss_after": evaluate(engine, own, weights, LANDMARKS).losses.loss,
        "weights": master_weights(engine),
    }
    engine.destroy()
    return found


def own_batches(setting: dict, base: Path, ranks: distributed.Ranks) -> list[Batch]:
    """This rank's micro-batches; one of them again and again where the setting says so."""
    if setting["repeated"]:
        return [micro_batches(base, setting["scenario"], count=ranks.world_size)[ranks.rank]] * setting["accumulation"]
    everything = micro_batches(base, setting["scenario"], count=ranks.world_size * setting["accumulation"])
    return everything[ranks.rank :: ranks.world_size]


def master_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The trained weights in the precision in which they are updated, whole."""
    named = [(name, parameter) for name, parameter in engine.module.peft_model.named_parameters()]
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if engine.zero_optimization_stage() > 0:
        masters = [safe_get_full_fp32_param(parameter) for _, parameter in named]
    elif engine.bfloat16_enabled():
        masters = list(chain.from_iterable(engine.optimizer.fp32_groups))
    else:
        masters = [parameter for _, parameter in named]
    return {name: master.detach().clone() for (name, _), master in zip(named, masters, strict=True)}


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
