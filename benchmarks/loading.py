"""Peak of a rank's private memory while ZeRO-3 loads a base: each weight split as it is read, or all of them first.

python benchmarks/loading.py           # a base of 0.6 GB of random weights on 4 ranks of a CPU
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from export import random_tensors
from measure import GIB, describe_run, print_table, write_json

from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.model.loading import HiggsAudioConfig, build_meta_model, load_model, released_model_config
from ds_higgs.model.weight_files import Shapes, write_weights
from ds_higgs.training.zero import build_deepspeed_config

RANKS = 4
WAYS = {"split as it is read": True, "whole first": False}


def model_config() -> HiggsAudioConfig:
    """A third of the released model's width, half of its layers, an eighth of its text vocabulary."""
    config = released_model_config()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size = 1024, 2752, 14, 16_384
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 2, 128
    text.pad_token_id = config.pad_token_id = 0
    config.audio_ffn_hidden_size, config.audio_ffn_intermediate_size = 1024, 2752
    config.audio_dual_ffn_layers = list(range(text.num_hidden_layers))
    return config


def write_base(folder: Path) -> Shapes:
    config = model_config()
    shapes = {name: tuple(weight.shape) for name, weight in build_meta_model(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    write_weights(folder, random_tensors(shapes), shapes=shapes, dtype=torch.bfloat16)
    return shapes


def private_bytes() -> int:
    """Of this process: what it has in memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


@contextmanager
def watched_peak(found: list[int]) -> Iterator[None]:
    """Put the largest of `private_bytes` meanwhile into `found`, above what there was."""
    over = threading.Event()
    before, peak = private_bytes(), [0]

    def watch() -> None:
        while not over.wait(0.001):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    found.append(max(peak[0], private_bytes()) - before)


def measure(base: Path, *, split: bool) -> None:
    """Print the largest peak of all ranks, from rank 0."""
    distributed.init_process_group()
    config = Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"base": str(base)},
            "data": {"train_manifest": "unused"},
            "zero": {"stage": 3},
        }
    )
    found: list[int] = []
    with watched_peak(found):
        load_model(base, dtype=torch.bfloat16, split_by=build_deepspeed_config(config) if split else None)
    peaks = [int(one) for one in distributed.gather_bytes(str(found[0]).encode())]
    if distributed.is_main_rank():
        print(json.dumps(peaks))
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "loading.json")
    parser.add_argument("--rank", nargs=2, metavar=("BASE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        measure(Path(arguments.rank[0]), split=WAYS[arguments.rank[1]])
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        sizes = [2 * prod(shape) for shape in write_base(base).values()]
        for way in WAYS:
            ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
            command = [sys.executable, *ranks, __file__, "--rank", str(base), way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks = json.loads(done.stdout.splitlines()[-1])
            rows.append(
                {
                    "way": way,
                    "base_gib": sum(sizes) / GIB,
                    "largest_weight_gib": max(sizes) / GIB,
                    "share_gib": sum(sizes) / RANKS / GIB,
                    "peak_of_a_rank_gib": max(peaks) / GIB,
                    "of_all_ranks_gib": sum(peaks) / GIB,
                }
            )
    print_table(rows)
    write_json(arguments.output, {"run": describe_run(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    if "--rank" in sys.argv:
        run_and_exit(main)
    main()
