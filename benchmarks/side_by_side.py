"""Our training step against that of train-higgs-audio, same weights and batch: CPU seconds, memory, loss, gradients.

    git clone https://github.com/JimmyMa99/train-higgs-audio
    python benchmarks/side_by_side.py train-higgs-audio    # CPU, fp32: hidden 256 and 2,048, two layers

Fetches nothing: it takes the folder of a checkout. Their side runs their own `boson_multimodal` (the model and the loss
in its forward) as their `HiggsAudioTrainer.compute_loss` calls it; each side in a process of its own.
"""

import argparse
import os
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
    write_json,
)
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
CALLS = 3
BATCH = (424, 488, 448, 480)  # positions of each sample
# The modules that both sides adapt.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


def write_case(folder: Path, *, hidden: int, layers: int) -> None:
    """The config, weights, adapter and batch that both sides get."""
    from workload import SampleShape, build_random_lora_model, make_batch, small_config

    config = small_config(hidden_size=hidden, num_layers=layers)
    model = build_random_lora_model(config, dtype=torch.float32, device=CPU, rank=RANK)
    config.save_pretrained(folder)
    weights = {own_name(name): weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / "weights.safetensors")
    batch = make_batch(config, [SampleShape.of_length(length) for length in BATCH])
    inputs = {name: value for name, value in batch.model_inputs.items() if value is not None}
    labels = {"label_ids": batch.labels.text, "label_audio_ids": batch.labels.audio}
    save_file({name: value.contiguous() for name, value in (inputs | labels).items()}, folder / "batch.safetensors")


def own_name(name: str) -> str:
    """A weight's name in the model itself, whatever wraps it."""
    return name.removeprefix("base_model.model.")


def prepare_theirs(folder: Path) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    import torch.distributed.tensor  # noqa: F401  PEFT takes it for imported
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
    from peft import LoraConfig, TaskType, get_peft_model

    model = HiggsAudioModel._from_config(HiggsAudioConfig.from_pretrained(folder)).train()
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=PROJECTIONS,
    )
    peft_model = get_peft_model(model, lora)
    load_weights(peft_model, folder)
    batch = load_file(folder / "batch.safetensors")
    del batch["audio_out_ids_start_group_loc"]  # their trainer does not hand it on
    return peft_model, lambda: peft_model(**batch).loss


def prepare_ours(folder: Path) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    from workload import SampleShape, build_random_lora_model, make_batch

    from ds_higgs.losses import LossWeights, build_targets
    from ds_higgs.model.loading import read_model_config
    from ds_higgs.model.lora import unwrap
    from ds_higgs.model.patches import apply_patches
    from ds_higgs.training.step_module import StepModule

    config = read_model_config(folder)
    peft_model = build_random_lora_model(config, dtype=torch.float32, device=CPU, rank=RANK)
    load_weights(peft_model, folder)
    apply_patches(
        unwrap(peft_model), packed_rows=True, kernels="torch", grouped_lora=True, activation_checkpointing=None
    )
    module = StepModule(peft_model)
    batch = make_batch(config, [SampleShape.of_length(length) for length in BATCH])
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=batch.labels.audio.shape[0])

    def loss() -> torch.Tensor:
        targets = build_targets(batch, placeholder_ids=module.placeholder_ids)
        return module(batch.model_inputs, targets, weights.scales(targets.counts()).float()).loss

    return peft_model, loss


def load_weights(peft_model: torch.nn.Module, folder: Path) -> None:
    """The case's weights, all of them and no others."""
    weights = load_file(folder / "weights.safetensors")
    parameters = {own_name(name): parameter for name, parameter in peft_model.named_parameters()}
    if parameters.keys() != weights.keys():
        raise SystemExit(f"the sides differ in {sorted(parameters.keys() ^ weights.keys())[:8]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def run_side(side: str, folder: Path) -> None:
    """Measure one side and save its first loss and gradients, CPU seconds of a step and memory."""
    peft_model, compute_loss = {"theirs": prepare_theirs, "ours": prepare_ours}[side](folder)
    trained = {own_name(name): weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    reset_peak_memory(CPU)
    before = memory_gib(CPU)
    loss = compute_loss()
    loss.backward()
    results = {f"grad/{name}": weight.grad.clone() for name, weight in trained.items()} | {"loss": loss.detach()}

    seconds = []
    for _ in range(CALLS):
        start = cpu_seconds()
        optimizer.zero_grad()
        compute_loss().backward()
        optimizer.step()
        seconds.append(cpu_seconds() - start)
    measured = {"cpu_s": sorted(seconds)[CALLS // 2], "before_gib": before, "peak_gib": peak_memory_gib(CPU)}
    results |= {name: torch.tensor(value, dtype=torch.float64) for name, value in measured.items()}
    save_file(results, folder / f"{side}.safetensors")


def cpu_seconds() -> float:
    """Of all threads: what other jobs on the machine do does not count."""
    times = os.times()
    return times.user + times.system


def compare(folder: Path, side: str, *, hidden: int) -> dict:
    """A row of the table; ratios and errors are against theirs."""
    results, theirs = (load_file(folder / f"{name}.safetensors") for name in (side, "theirs"))
    step, their_step = (source["peak_gib"] - source["before_gib"] for source in (results, theirs))
    return {
        "hidden": hidden,
        "side": side,
        "cpu_s": results["cpu_s"].item(),
        "peak_gib": results["peak_gib"].item(),
        "step_gib": step.item(),
        "cpu_ratio": (results["cpu_s"] / theirs["cpu_s"]).item(),
        "peak_ratio": (results["peak_gib"] / theirs["peak_gib"]).item(),
        "step_ratio": (step / their_step).item(),
        "loss": results["loss"].item(),
        "grad_error": gradient_error(results, theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of train-higgs-audio")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/side_by_side.json"))
    parser.add_argument("--side", choices=["theirs", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.side == "theirs":
            sys.path.insert(0, str(arguments.checkout.resolve()))
        run_side(arguments.side, arguments.case)
        return
    if not (arguments.checkout / "boson_multimodal").is_dir():
        parser.error(f"{arguments.checkout}: holds no boson_multimodal")
    rows = []
    for hidden in arguments.hidden:
        with tempfile.TemporaryDirectory() as folder:
            write_case(Path(folder), hidden=hidden, layers=arguments.layers)
            for side in ("theirs", "ours"):
                command = [sys.executable, __file__, str(arguments.checkout), "--side", side, "--case", folder]
                subprocess.run(command, check=True)
                rows.append(compare(Path(folder), side, hidden=hidden))
    print_table(rows)
    commit = subprocess.run(
        ["git", "-C", arguments.checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    settings = {"layers": arguments.layers, "batch": BATCH, "calls": CALLS, "train-higgs-audio": commit}
    write_json(arguments.output, {"run": describe_run(CPU), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
