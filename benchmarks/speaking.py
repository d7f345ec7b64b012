"""Prompts spoken at once against the same prompts one by one with boson's own generate.

    python benchmarks/speaking.py            # 8 prompts, CPU, fp32, two shapes of random models

The two take turns within one run, so that what else the machine does falls on both; ratios are of medians, of seconds
on the clock and of the process's CPU seconds, which a busy machine stretches less. The codes have to be equal.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from measure import describe_run, print_table, synchronise, write_json
from workload import SampleShape, build_random_lora_model, make_sample, small_config

from ds_higgs.batch import ModelInputs
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.prompts import collate_prompt, cut_prompt
from ds_higgs.layout import AudioLayout
from ds_higgs.model.batched_generation import generate_together
from ds_higgs.model.generation import GREEDY, GeneratedCodes, Sampling, generate_codes
from ds_higgs.model.lora import unwrap

# hidden size, layers: as the tiny base, and as deep as the released model
SHAPES = {"4 layers of 128": (128, 4), "28 layers of 128": (128, 28)}
SAMPLINGS = {"greedy": GREEDY, "sampled": Sampling()}


def build_prompts(config, count: int) -> list[ModelInputs]:
    """Prompts of unequal lengths, each with a reference of 1 to 3 s."""
    collator, numbers = BatchCollator(AudioLayout.from_config(config)), torch.Generator().manual_seed(0)
    prompts = []
    for number in range(count):
        shape = SampleShape(20 + 5 * number, 25 + 50 * number // count, 8 + 3 * number, 5)
        prompt = cut_prompt(make_sample(config, shape, numbers), collator.layout)
        prompt.sample.input_ids[-1] = config.audio_out_bos_token_id
        prompts.append(collate_prompt(prompt, collator))
    return prompts


def measure(model, prompts: list[ModelInputs], sampling: Sampling, *, frames: int, calls: int) -> dict:
    """Seconds both ways, taking turns, and whether they say the same."""
    settings = {"max_frames": frames, "sampling": sampling}

    def one_by_one() -> list[GeneratedCodes]:
        return [generate_codes(model, prompt, seed=seed, **settings) for seed, prompt in enumerate(prompts)]

    def together() -> list[GeneratedCodes]:
        return generate_together(model, prompts, seeds=range(len(prompts)), **settings)

    ways = {"one_by_one": one_by_one, "together": together}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(calls):
        spoken = []
        for name, speak in ways.items():
            synchronise(model.device)
            start, cpu_start = time.perf_counter(), time.process_time()
            spoken.append(speak())
            synchronise(model.device)
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
    clock, cpu = ({name: statistics.median(of[name]) for name in ways} for of in (seconds, cpu_seconds))
    return {
        **{f"{name}_s": value for name, value in clock.items()},
        "times_faster": clock["one_by_one"] / clock["together"],
        **{f"{name}_cpu_s": value for name, value in cpu.items()},
        "times_less_cpu": cpu["one_by_one"] / cpu["together"],
        "frames": sum(one.codes.shape[1] for one in spoken[1]),
        "same_codes": all(torch.equal(one.codes, other.codes) for one, other in zip(*spoken, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--frames", type=int, default=100, help="of each speech (4 s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speaking.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rows = torch.device(arguments.device), []
    for name, (hidden_size, num_layers) in SHAPES.items():
        config = small_config(hidden_size=hidden_size, num_layers=num_layers, vocab_size=1500)
        config.audio_out_bos_token_id, config.audio_eos_token_id = 1495, 1496
        model = unwrap(build_random_lora_model(config, dtype=torch.float32, device=device)).eval()
        prompts = build_prompts(config, arguments.prompts)
        for kind, sampling in SAMPLINGS.items():
            measured = measure(model, prompts, sampling, frames=arguments.frames, calls=arguments.calls)
            rows.append({"model": name, "codes": kind, "prompts": arguments.prompts, **measured})
    print_table(rows)
    write_json(arguments.output, {"run": describe_run(device), "rows": rows})


if __name__ == "__main__":
    main()
