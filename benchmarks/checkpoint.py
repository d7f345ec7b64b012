"""A save of the real model's trainable weights (LoRA rank 16, 39.5 M) against plain writing of as many bytes.

torchrun --nproc_per_node 2 benchmarks/checkpoint.py [--folder DIR] [--calls 7]
torchrun --nproc_per_node 2 benchmarks/checkpoint.py --rank 30   # 1 GB of state

The trainable tensors have the real names and shapes; of the frozen weights there is one small layer, since none of
them is in a checkpoint. All ways end with the bytes on the disk (fsync), and take turns on the same disk; "stall with
async" is what a run's steps wait for, with `checkpoint.async`, until they are.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from measure import describe_run, print_table, write_json
from torch import nn

from ds_higgs.checkpoint import (
    Background,
    Commit,
    PendingCheckpoint,
    begin_checkpoint,
    capture_random_state,
    load_checkpoint,
)
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit

HIDDEN, FFN, KEY_VALUE, LAYERS = 3072, 8192, 1024, 28
ATTENTION = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, KEY_VALUE), "v_proj": (HIDDEN, KEY_VALUE)}
ATTENTION["o_proj"] = (HIDDEN, HIDDEN)
FEED_FORWARD = {"gate_proj": (HIDDEN, FFN), "up_proj": (HIDDEN, FFN), "down_proj": (FFN, HIDDEN)}
PATHS = {"self_attn": ATTENTION, "mlp": FEED_FORWARD, "audio_mlp": FEED_FORWARD}


class LoraWeights(nn.Module):
    """The LoRA tensors of Higgs Audio v2 on all three paths, and one frozen layer."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.layers = nn.ModuleList(nn.ModuleDict(_layer(rank)) for _ in range(LAYERS))

    def forward(self) -> torch.Tensor:
        return sum(parameter.float().square().sum() for parameter in self.parameters() if parameter.requires_grad)


def _layer(rank: int) -> dict[str, nn.Module]:
    return {
        path: nn.ModuleDict({name: _lora(inputs, outputs, rank) for name, (inputs, outputs) in projections.items()})
        for path, projections in PATHS.items()
    }


def _lora(inputs: int, outputs: int, rank: int) -> nn.Module:
    return nn.ModuleDict(
        {"lora_A": nn.Linear(inputs, rank, bias=False), "lora_B": nn.Linear(rank, outputs, bias=False)}
    )


def build_engine(stage: int, rank: int):
    torch.manual_seed(0)
    model = LoraWeights(rank)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 60_000_000},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def begin(engine, folder: Path, step: int, background: Background | None = None) -> PendingCheckpoint:
    return begin_checkpoint(
        engine,
        folder,
        step=step,
        state={"step": step},
        rank_state=capture_random_state(),
        commit=Commit(keep_latest=1),
        background=background,
    )


def save(engine, folder: Path, step: int) -> Path:
    return begin(engine, folder, step).finish()


def stall(engine, folder: Path, step: int, background: Background) -> float:
    """Seconds that the steps of a run wait for a save in the background: for its copy, and between its phases."""
    dist.barrier()
    started = time.perf_counter()
    pending = begin(engine, folder, step, background)
    waited = time.perf_counter() - started
    complete = None
    while complete is None:
        while distributed.any_rank(not pending.is_ready):
            time.sleep(0.05)  # the steps of the run
        started = time.perf_counter()
        complete = pending.advance()
        waited += time.perf_counter() - started
    return waited


def plain_write(folder: Path, sizes: list[int]) -> None:
    """What rank 0 has to write of a checkpoint, and every rank its own shard: bytes from memory to the disk."""
    path = folder / f"plain-{dist.get_rank()}"
    with path.open("wb") as file:
        for size in sizes:
            file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
    dist.barrier()


def own_sizes(checkpoint: Path) -> list[int]:
    """Sizes of the files that this rank writes."""
    rank = dist.get_rank()
    names = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", f"rank-{rank:05d}.safetensors"]
    names += ["mp_rank_00_model_states.pt", "state.json", "complete.json"] if rank == 0 else []
    return [path.stat().st_size for name in names for path in checkpoint.glob(name)]


def timed(action) -> float:
    dist.barrier()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{p}_s": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 50, 80)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA: 30 makes 1 GB of state")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    arguments = parser.parse_args()
    ranks = distributed.init_process_group()
    shared = [tempfile.mkdtemp(prefix="ds_higgs_checkpoint_", dir=arguments.folder) if ranks.is_main else None]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])

    engine = build_engine(arguments.stage, arguments.rank)
    engine.backward(engine())
    engine.step()
    checkpoint = save(engine, folder, 1)
    sizes = own_sizes(checkpoint)
    plain_write(folder, sizes)
    times: dict[str, list[float]] = {"save_checkpoint": [], "plain writing": [], "stall with async": []}
    background = Background()
    stall(engine, folder, 2, background)  # which makes the buffers
    for call in range(arguments.calls):
        times["plain writing"].append(timed(lambda: plain_write(folder, sizes)))
        times["save_checkpoint"].append(timed(lambda step=2 * call + 3: save(engine, folder, step)))
        times["stall with async"].append(stall(engine, folder, 2 * call + 4, background))
    newest = folder / "checkpoints" / f"step-{2 * arguments.calls + 2:08d}"
    times["load_checkpoint"] = [timed(lambda: load_checkpoint(engine, newest))]
    dist.barrier()

    if ranks.is_main:
        total = sum(path.stat().st_size for path in newest.iterdir())
        trainable = sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)
        rows = [
            {"what": what, **percentiles(seconds), "mb_s": total / 1e6 / percentiles(seconds)["p50_s"]}
            for what, seconds in times.items()
        ]
        ratio, stall_ratio = rows[0]["p50_s"] / rows[1]["p50_s"], rows[2]["p50_s"] / rows[0]["p50_s"]
        print_table(rows)
        print(
            f"{trainable:,} trainable, {total / 1e6:.0f} MB, {ranks.world_size} ranks: save / plain {ratio:.2f}, "
            f"stall with async / save {stall_ratio:.2f}"
        )
        result = {
            "run": describe_run(engine.device),
            "world_size": ranks.world_size,
            "stage": arguments.stage,
            "trainable": trainable,
            "bytes": total,
            "rows": rows,
            "save_over_plain": ratio,
            "stall_over_save": stall_ratio,
        }
        write_json(arguments.output, result)
        shutil.rmtree(folder)
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_and_exit(main)
