"""What an optimizer step costs the host, where a GPU would wait for it: all of the model's layers, hardly any width.

    python benchmarks/host.py                # CPU: 28 layers of hidden 64, bf16, ZeRO-2, one process

On such a model nearly all time is Python and dispatch, as on a GPU that is faster than its host. The passes are the
model's forward and backward; the rest is what DeepSpeed and the training step do once or per micro-batch: collecting,
reducing and checking gradients, and the update.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from measure import describe_run, print_table, write_json
from torch.utils._python_dispatch import TorchDispatchMode
from workload import SampleShape, build_random_lora_model, make_batch, small_config

from ds_higgs.batch import Batch
from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.losses import LossWeights
from ds_higgs.model.lora import unwrap
from ds_higgs.model.patches import apply_patches
from ds_higgs.training.engine import build_engine
from ds_higgs.training.train_step import train_step
from ds_higgs.training.zero import build_deepspeed_config

ACCUMULATION = (1, 4)
WARM_UP = 2
# Views that torch does not mark as views, and allocations.
WITHOUT_KERNEL = ("aten.detach", "aten.alias", "aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.reshape")


class Launches(TorchDispatchMode):
    """Counts operations that would launch kernels on a GPU; one for many tensors counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and not str(func).startswith(WITHOUT_KERNEL)
        return func(*args, **(kwargs or {}))


class Passes:
    """CPU seconds spent in the engine's forward and backward, and the operations launched there."""

    def __init__(self, engine: DeepSpeedEngine, launches: Launches):
        self.seconds = 0.0
        self.count = 0
        self._launches = launches
        self._stock = engine.forward, engine.backward
        engine.forward, engine.backward = (self._watched(call) for call in self._stock)

    def leave(self, engine: DeepSpeedEngine) -> None:
        engine.forward, engine.backward = self._stock

    def _watched(self, call: Callable) -> Callable:
        def watched(*arguments: Any, **named: Any) -> Any:
            start, count = time.process_time(), self._launches.count
            result = call(*arguments, **named)
            self.seconds += time.process_time() - start
            self.count += self._launches.count - count
            return result

        return watched


def build(arguments: argparse.Namespace) -> tuple[DeepSpeedEngine, Batch]:
    """The engine as `ds-higgs train` builds it, around a model of random weights, and a short micro-batch."""
    model_config = small_config(hidden_size=64, num_layers=arguments.layers, vocab_size=1500)
    model = build_random_lora_model(model_config, dtype=torch.bfloat16, device=torch.device("cpu"), dropout=0.05)
    apply_patches(unwrap(model), packed_rows=True, kernels="torch", activation_checkpointing=None)
    config = Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"base": "random"},
            "data": {"train_manifest": "unused"},
            "zero": {"stage": arguments.stage},
            "logging": {"tensorboard": False},
        }
    )
    ranks = distributed.init_process_group()
    deepspeed_config = build_deepspeed_config(config)
    engine = build_engine(config, model, deepspeed_config=deepspeed_config, total_steps=1000, ranks=ranks)
    return engine, make_batch(model_config, [SampleShape(8, 3, 4, 5)])


def measure(engine: DeepSpeedEngine, batch: Batch, *, accumulation: int, calls: int) -> dict[str, Any]:
    """Launches of a step, and milliseconds of this process's CPU time, in its passes and in the rest."""
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=batch.labels.audio.shape[0])
    launches, steps = Launches(), []
    passes = Passes(engine, launches)
    for _ in range(WARM_UP + calls):
        passes.seconds, start = 0.0, time.process_time()
        train_step(engine, [batch] * accumulation, weights)
        steps.append((passes.seconds, time.process_time() - start - passes.seconds))
    passes.count = 0
    with launches:
        train_step(engine, [batch] * accumulation, weights)
    passes.leave(engine)
    pass_ms, rest_ms = (1e3 * statistics.median(seconds) for seconds in zip(*steps[WARM_UP:], strict=True))
    return {
        "micro-batches": accumulation,
        "passes_launches": passes.count,
        "rest_launches": launches.count - passes.count,
        "passes_ms": pass_ms,
        "rest_ms": rest_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2))
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/host.json"))
    arguments = parser.parse_args()
    engine, batch = build(arguments)
    rows = [measure(engine, batch, accumulation=one, calls=arguments.calls) for one in ACCUMULATION]
    distributed.destroy_process_group()
    print_table(rows)
    trained = len(engine.module.trained)
    settings = {"layers": arguments.layers, "zero_stage": arguments.stage, "trained_tensors": trained}
    write_json(arguments.output, {"run": describe_run(torch.device("cpu")), "settings": settings, "rows": rows})


if __name__ == "__main__":
    run_and_exit(main)
