"""Our training step against the plain one: time, peak memory, tokens/s, and that losses and gradients are equal.

    python benchmarks/step.py                 # CPU, fp32: vocabulary 128,256, hidden 512, 8 layers, batch 4 x ~460

The plain step is what public Higgs Audio trainers do: full text logits, a loop over 8 codebooks, the stock layers, the
batch padded as it comes, no activation checkpointing. Every variant runs in a process of its own, in the same run.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import (
    describe_run,
    gradient_error,
    memory_gib,
    peak_memory_gib,
    print_table,
    reset_peak_memory,
    time_calls,
    write_json,
)
from safetensors.torch import load_file, save_file
from workload import SampleShape, build_random_lora_model, make_batch, plain_loss, small_config

from ds_higgs.batch import Batch
from ds_higgs.losses import LossWeights, build_targets
from ds_higgs.model.lora import unwrap
from ds_higgs.model.patches import apply_patches
from ds_higgs.training.step_module import StepModule

LossFunction = Callable[[], tuple[torch.Tensor, torch.Tensor]]

# The patches of a variant; the plain step has none, and full logits.
STOCK: dict = {"packed_rows": False, "kernels": "plain", "grouped_lora": False, "activation_checkpointing": None}
OURS: dict = {"packed_rows": True, "kernels": "torch", "grouped_lora": True, "activation_checkpointing": None}
VARIANTS: dict[str, dict] = {
    "plain": STOCK,
    "supervised heads": STOCK,
    "+ packed rows": {**STOCK, "packed_rows": True},
    "+ grouped LoRA": {**STOCK, "packed_rows": True, "grouped_lora": True},
    "+ torch's kernels (ours)": OURS,
    "+ checkpoint every 4th": {**OURS, "activation_checkpointing": 4},
    "+ checkpoint every 3rd": {**OURS, "activation_checkpointing": 3},
    "+ checkpoint every 2nd": {**OURS, "activation_checkpointing": 2},
    "+ checkpoint every layer": {**OURS, "activation_checkpointing": 1},
}


def build_loss_function(variant: str, peft_model, batch: Batch) -> LossFunction:
    """A function that gives the loss and [1 + codebooks] losses (text, then each codebook) of `batch`."""
    apply_patches(unwrap(peft_model), **VARIANTS[variant])
    if variant == "plain":
        return lambda: plain_loss(peft_model, batch)
    module = StepModule(peft_model)
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=batch.labels.audio.shape[0])

    def loss_function() -> tuple[torch.Tensor, torch.Tensor]:
        targets = build_targets(batch, placeholder_ids=module.placeholder_ids)
        counts = targets.counts()
        output = module(batch.model_inputs, targets, weights.scales(counts).float())
        return output.loss, output.sums / counts

    return loss_function


def run_variant(variant: str, arguments: argparse.Namespace) -> None:
    """Measure one variant and save its first losses and gradients, its times and its memory to `arguments.save`."""
    device = torch.device("cpu")
    config = small_config(hidden_size=arguments.hidden, num_layers=arguments.layers, vocab_size=arguments.vocab)
    peft_model = build_random_lora_model(config, dtype=torch.float32, device=device)
    lengths = [arguments.positions + offset for offset in (-36, 28, -12, 20)][: arguments.batch_size]
    batch = make_batch(config, [SampleShape.of_length(length) for length in lengths])
    trained = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    loss_function = build_loss_function(variant, peft_model, batch)

    reset_peak_memory(device)
    before = memory_gib(device)
    loss, losses = loss_function()
    loss.backward()
    results = {f"grad/{name}": weight.grad.clone() for name, weight in trained.items()}
    results |= {"loss": loss.detach(), "losses": losses.double()}

    def step() -> None:
        optimizer.zero_grad()
        loss, _ = loss_function()
        loss.backward()
        optimizer.step()

    timing = time_calls(step, calls=arguments.calls, warmup=0, device=device)
    measured = {**timing, "before_gib": before, "peak_gib": peak_memory_gib(device), "tokens": float(batch.num_tokens)}
    results |= {f"measured/{name}": torch.tensor(value, dtype=torch.float64) for name, value in measured.items()}
    save_file(results, arguments.save)


def run_in_process(variant: str, save: Path) -> dict[str, torch.Tensor]:
    command = [sys.executable, *sys.argv, "--variant", variant, "--save", str(save)]
    subprocess.run(command, check=True)
    return load_file(save)


def compare(variant: str, results: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> dict:
    """A row of the table: absolute numbers, ratios to the plain step, largest relative errors against it."""
    measured = {name.split("/")[1]: value.item() for name, value in results.items() if name.startswith("measured/")}
    return {
        "variant": variant,
        "p20_s": measured["p20_s"],
        "p50_s": measured["p50_s"],
        "p80_s": measured["p80_s"],
        "tokens/s": measured["tokens"] / measured["p50_s"],
        "peak_gib": measured["peak_gib"],
        "step_gib": measured["peak_gib"] - measured["before_gib"],
        "time_ratio": measured["p50_s"] / plain["measured/p50_s"].item(),
        "peak_ratio": measured["peak_gib"] / plain["measured/peak_gib"].item(),
        "loss_error": float(((results["losses"] - plain["losses"]).abs() / plain["losses"]).max()),
        "grad_error": gradient_error(results, plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--positions", type=int, default=460)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step_cpu.json"))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        run_variant(arguments.variant, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {variant: run_in_process(variant, Path(folder) / "results") for variant in VARIANTS}
    rows = [compare(variant, result, results["plain"]) for variant, result in results.items()]
    print_table(rows)
    settings = {name: getattr(arguments, name) for name in ("hidden", "layers", "vocab", "batch_size", "positions")}
    write_json(arguments.output, {"run": describe_run(torch.device("cpu")), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
