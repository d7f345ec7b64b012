"""Bytes that DeepSpeed sends in an optimizer step on 2 ranks, measured by its own logger, against the formulas.

python benchmarks/communication.py     # CPU, gloo; the formulas are derived in benchmarks/scaling.md
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import describe_run, print_table, write_json
from workload import SampleShape, build_random_lora_model, make_batch, small_config

from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.losses import LossWeights
from ds_higgs.model.lora import count_parameters, unwrap
from ds_higgs.model.patches import apply_patches
from ds_higgs.training.engine import build_engine
from ds_higgs.training.train_step import train_step
from ds_higgs.training.zero import build_deepspeed_config

STAGES = (1, 2, 3)
STEPS = 3

# Of the predicted efficiency: one H200 at half its bf16 peak, 8 GPUs a node, what a ring reaches within and between.
ACTIVE_PARAMETERS = 2_818_572_288
TOKENS_PER_MICRO_BATCH = 8000
SUSTAINED_FLOPS = 0.5 * 989e12
GPUS_PER_NODE = 8
NVLINK_BYTES_PER_S = 350e9
NETWORK_BYTES_PER_S = 40e9


@dataclass(frozen=True)
class Volume:
    """Bytes of an optimizer step's collectives, before they are cut up among ranks: whole gradients, whole weights.

    gathered: weights that an all-gather brings together, in all; ZeRO-3 does it once per micro-batch where all weights
    stay (they are fewer than DeepSpeed's limit of 1e9 live ones), else for the forward and for the backward pass.
    """

    reduced: int
    gathered: int

    @classmethod
    def of(cls, *, stage: int, frozen: int, trainable: int, micro_batches: int = 1) -> "Volume":
        """With bf16 weights and fp32 reduction."""
        if stage < 3:
            return cls(reduced=4 * trainable, gathered=2 * trainable)
        gathers = 1 if frozen + trainable < 1e9 else 2
        return cls(reduced=4 * trainable, gathered=2 * (frozen + trainable) * gathers * micro_batches)

    def logged(self, world_size: int) -> int:
        """As DeepSpeed's logger counts: what a rank hands in, the whole gradients and its own shard of the weights."""
        return self.reduced + self.gathered // world_size

    def sent(self, stage: int, world_size: int) -> float:
        """What a rank puts on the wire by rings: an all-reduce is a reduce-scatter and an all-gather."""
        share = (world_size - 1) / world_size
        reduction = 2 if stage < 3 else 1  # DeepSpeed all-reduces at stages 1 and 2, and keeps its part
        return share * (reduction * self.reduced + self.gathered)


def predict_efficiency(stage: int, world_size: int, *, micro_batches: int) -> float:
    """Compute time over step time of the released model, rank 16, without overlap; the assumptions are constants."""
    volume = Volume.of(stage=stage, frozen=5_771_283_456, trainable=39_452_672, micro_batches=micro_batches)
    compute_s = micro_batches * 4 * ACTIVE_PARAMETERS * TOKENS_PER_MICRO_BATCH / SUSTAINED_FLOPS
    bandwidth = NVLINK_BYTES_PER_S if world_size <= GPUS_PER_NODE else NETWORK_BYTES_PER_S
    return compute_s / (compute_s + volume.sent(stage, world_size) / bandwidth)


def measure_stage(stage: int, save: Path) -> None:
    """Run a few steps as one of the ranks and save what DeepSpeed logged, per step."""
    from deepspeed.comm.comm import comms_logger

    ranks = distributed.init_process_group()
    config = Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"base": "random"},
            "data": {"train_manifest": "unused"},
            "logging": {"tensorboard": False},
            "zero": {"stage": stage, "extra": {"comms_logger": {"enabled": True, "prof_all": True}}},
        }
    )
    model_config = small_config(hidden_size=256, num_layers=4, vocab_size=2048)
    model = build_random_lora_model(model_config, dtype=torch.bfloat16, device=torch.device("cpu"))
    apply_patches(unwrap(model), packed_rows=True, kernels="torch", activation_checkpointing=None)
    counts = count_parameters(model)
    deepspeed_config = build_deepspeed_config(config)
    engine = build_engine(config, model, deepspeed_config=deepspeed_config, total_steps=100, ranks=ranks)
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)
    batch = make_batch(model_config, [SampleShape.of_length(100)], seed=ranks.rank)
    train_step(engine, [batch], weights)
    before = logged_bytes(comms_logger.comms_dict)
    for _ in range(STEPS):
        train_step(engine, [batch], weights)
    after = logged_bytes(comms_logger.comms_dict)
    if ranks.is_main:
        per_step = {name: (after[name] - before[name]) / STEPS for name in after if after[name] > before[name]}
        save.write_text(json.dumps({"stage": stage, "counts": counts, "bytes": per_step}))
    distributed.destroy_process_group()


def logged_bytes(log: dict) -> Counter:
    """Operation to bytes: message sizes times how often they were sent."""
    return Counter({name: sum(size * entry[0] for size, entry in sizes.items()) for name, sizes in log.items()})


def run_stage(stage: int, save: Path) -> dict:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, sys.argv[0], "--stage", str(stage), "--save", str(save)], check=True)
    measured = json.loads(save.read_text())
    counts = measured["counts"]
    frozen = counts["total"] - counts["trainable"]
    prediction = Volume.of(stage=stage, frozen=frozen, trainable=counts["trainable"]).logged(world_size=2)
    total = sum(measured["bytes"].values())
    operations = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sorted(measured["bytes"].items()))
    return {
        "stage": stage,
        "trainable": counts["trainable"],
        "total": counts["total"],
        "measured_MB": total / 1e6,
        "predicted_MB": prediction / 1e6,
        "ratio": total / prediction,
        "operations_MB": operations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/communication.json"))
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None and "RANK" in os.environ:
        measure_stage(arguments.stage, arguments.save)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_stage(stage, Path(folder) / f"{stage}.json") for stage in STAGES]
    print_table(rows)
    efficiencies = [
        {
            "GPUs": world_size,
            **{
                f"ZeRO-{stage}, {micro_batches} micro-batches": predict_efficiency(
                    stage, world_size, micro_batches=micro_batches
                )
                for stage in (2, 3)
                for micro_batches in (1, 8)
            },
        }
        for world_size in (1, 2, 4, 8, 16, 32, 64)
    ]
    print_table(efficiencies)
    run = describe_run(torch.device("cpu"))
    write_json(arguments.output, {"run": run, "rows": rows, "predicted_efficiency": efficiencies})


if __name__ == "__main__":
    run_and_exit(main)
