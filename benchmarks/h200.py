"""Everything on one CUDA GPU at the released model's shapes, with random weights: one command, under 8 minutes.

    python benchmarks/h200.py                        # 5.77 B parameters, rank 16, bf16; and what each choice gains
    python benchmarks/h200.py --dry-run              # what would be measured, and what the simulation predicts
    python benchmarks/h200.py --device cpu --tiny    # the same code at toy shapes, to see that it runs

Ours is the training step as `ds-higgs train` runs it: DeepSpeed's engine (ZeRO-2) and `train_step`. The plain step is
what public Higgs Audio trainers do: full text logits, a loop over 8 codebooks, the stock layers, torch's AdamW. Every
case runs in a process of its own; one that runs out of memory is reported as such. Model FLOP utilisation counts 4 FLOP
per active parameter and token: frozen weights need no weight gradient.
"""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import (
    describe_run,
    peak_flops,
    peak_memory_gib,
    print_table,
    reset_peak_memory,
    time_calls,
    write_json,
)
from workload import (
    SampleShape,
    active_parameters,
    build_random_lora_model,
    make_batch,
    plain_loss,
    small_config,
)

from ds_higgs.batch import Batch
from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.losses import LossWeights
from ds_higgs.model.loading import released_model_config
from ds_higgs.model.lora import unwrap
from ds_higgs.model.patches import apply_patches
from ds_higgs.sizing.estimator import describe_checkpointing
from ds_higgs.training.engine import build_engine
from ds_higgs.training.train_step import train_step
from ds_higgs.training.zero import build_deepspeed_config

OUT_OF_MEMORY = 3
SIMULATED = Path(__file__).with_name("results") / "simulated_h200.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to measure; without arguments, the default of `ds-higgs train`. recompute: every N-th layer."""

    step: str = "ours"
    batch_size: int = 8
    positions: int = 500
    kernels: str = "torch"
    compiled: bool = True
    grouped_lora: bool = True
    attention: str = "sdpa"
    recompute: int = 0
    packed_rows: bool = True
    dropout: float = 0.05
    quantization: str | None = None


# What is decided: each is measured alone against the default, at the same batch.
CHOICES = ("packed_rows", "grouped_lora", "kernels", "compiled", "attention", "recompute", "dropout", "quantization")
CHOICE_PACKAGES = ("liger_kernel", "flash_attn", "bitsandbytes")
STOCK_LAYERS = {"kernels": "plain", "compiled": False, "grouped_lora": False, "packed_rows": False}


def list_cases(*, cuda: bool, tiny: bool, everything: bool = False) -> list[Case]:
    """The default and the plain step, each choice alone, then larger batches and longer samples; as time allows.

    Args:
        everything: those too whose package is not installed here.
    """
    if tiny:
        small = [Case(batch_size=size, positions=60, compiled=False) for size in (1, 2, 4)]
        changes = (STOCK_LAYERS, {"grouped_lora": False}, {"recompute": 1})
        return [
            Case("plain", 2, 60, **STOCK_LAYERS),
            *small,
            *(dataclasses.replace(small[1], **one) for one in changes),
        ]
    default = Case()
    alone: list[dict[str, Any]] = [
        {"compiled": False},
        {"kernels": "plain", "compiled": False},
        {"grouped_lora": False},
    ]
    alone += [STOCK_LAYERS, {"recompute": 1}, {"recompute": 2}, {"dropout": 0.0}]
    installed = [name for name in CHOICE_PACKAGES if everything or importlib.util.find_spec(name)] if cuda else []
    if "liger_kernel" in installed:
        alone.insert(0, {"kernels": "liger", "compiled": False})
    if "flash_attn" in installed:
        alone.insert(0, {"attention": "flash_attention_2"})
    if cuda:
        alone.insert(0, {"attention": "varlen"})
        alone.append({"quantization": "fp8"})
    if "bitsandbytes" in installed:
        alone.append({"quantization": "nf4"})
    cases = [default, Case("plain", **STOCK_LAYERS), *(dataclasses.replace(default, **change) for change in alone)]
    cases += [Case(batch_size=size) for size in (2, 16, 32)] + [Case("plain", 2, **STOCK_LAYERS)]
    cases += [Case(batch_size=size, positions=2000) for size in (2, 8)]
    cases += [
        dataclasses.replace(case, positions=2000)
        for case in cases
        if case.kernels == "liger" or case.attention != "sdpa"
    ]
    return [*cases, Case(batch_size=32, recompute=1), Case("plain", 2, 2000, **STOCK_LAYERS)]


def predicted_tokens_per_second(case: Case) -> float | None:
    """What `simulate.py` has predicted for an H200, for the settings that it knows."""
    shape = {"batch_size": case.batch_size, "positions": case.positions}
    layers = {
        Case(**shape, compiled=False): "torch",
        Case(**shape, kernels="liger", compiled=False): "liger",
        Case(**shape): "compiled",
        Case(**shape, attention="varlen"): "compiled, varlen",
    }
    simulated = json.loads(SIMULATED.read_text())
    if case in layers:
        key, rows = layers[case], simulated["variants"]
        found = [row for row in rows if row["layer"] == key]
    else:
        recomputed = dataclasses.replace(Case(**shape, compiled=False), recompute=case.recompute)
        policy = describe_checkpointing(case.recompute or None)
        found = [row for row in simulated["rows"] if row["checkpointing"] == policy] if case == recomputed else []
    found = [row for row in found if (row["batch"], row["positions"]) == (case.batch_size, case.positions)]
    return found[0]["predicted tokens/s"] if found else None


def decide(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each choice against the default at the same batch, where nothing else differs; the fastest batch last."""
    measured = [row for row in rows if row["step"] == "ours" and row.get("tokens/s")]
    defaults = {(row["batch_size"], row["positions"]): row for row in measured if not _changed(row)}
    found = []
    for row in measured:
        default = defaults.get((row["batch_size"], row["positions"]))
        changed = _changed(row)
        if default is not None and changed:
            choice = ", ".join(f"{name}: {row[name]}" for name in changed)
            speed, memory = (row[name] / default[name] for name in ("tokens/s", "peak_gib"))
            at = f"{row['batch_size']} x {row['positions']}"
            found.append({"choice": choice, "at": at, "speed": speed, "memory": memory, "take it": speed > 1.01})
    fastest = max(measured, key=lambda row: row["tokens/s"], default=None)
    if fastest is not None:
        at = f"{fastest['batch_size']} x {fastest['positions']}"
        found.append({"choice": "fastest of all", "at": at, "tokens/s": fastest["tokens/s"]})
    return found


def _changed(row: dict[str, Any]) -> list[str]:
    """The choices of a case that are not the default's (at toy shapes nothing is compiled)."""
    return [name for name in CHOICES if row[name] != getattr(Case(compiled=row["positions"] >= 500), name)]


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the model and measure one case on this process's device."""
    device = torch.device(arguments.device)
    config = small_config(hidden_size=128, num_layers=2, vocab_size=2048) if arguments.tiny else released_model_config()
    positions = case.positions
    model = build_random_lora_model(
        config,
        dtype=torch.bfloat16,
        device=device,
        dropout=case.dropout,
        attention="sdpa" if case.attention == "varlen" else case.attention,
        quantization=case.quantization,
    )
    apply_patches(
        unwrap(model),
        packed_rows=case.packed_rows,
        kernels=case.kernels,
        compiled=case.compiled,
        varlen=case.attention == "varlen",
        grouped_lora=case.grouped_lora,
        activation_checkpointing=case.recompute or None,
    )
    spread = max(1, positions // 10)
    lengths = [positions + spread * (index % 3 - 1) for index in range(case.batch_size)]
    batch = make_batch(config, [SampleShape.of_length(length) for length in lengths])
    build = build_plain_step if case.step == "plain" else build_our_step
    step = build(model, batch, device)

    step()
    reset_peak_memory(device)
    timing = time_calls(step, calls=arguments.calls, warmup=2, device=device)
    tokens_per_second = batch.num_tokens / timing["p50_s"]
    row = {"tokens/s": tokens_per_second, "peak_gib": peak_memory_gib(device), **timing, "num_tokens": batch.num_tokens}
    peak = peak_flops(device)
    if peak is not None:
        row["mfu"] = 4 * active_parameters(config) * tokens_per_second / peak
    if arguments.profile:
        row["profile"] = profile_step(step, device)
    return row


def build_plain_step(model, batch: Batch, device: torch.device) -> Callable[[], object]:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batch = batch.to(device)

    def step() -> None:
        optimizer.zero_grad()
        loss, _ = plain_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def build_our_step(model, batch: Batch, device: torch.device) -> Callable[[], object]:
    config = Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"base": "random"},
            "data": {"train_manifest": "unused", "batch_size": len(batch.sample_ids)},
            "logging": {"tensorboard": False},
        }
    )
    ranks = distributed.init_process_group()
    deepspeed_config = build_deepspeed_config(config)
    engine = build_engine(config, model, deepspeed_config=deepspeed_config, total_steps=1000, ranks=ranks)
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=batch.labels.audio.shape[0])
    if device.type == "cuda":
        batch = batch.pin_memory()
    return lambda: train_step(engine, [batch], weights)


def profile_step(step: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The 25 operations that take most of the device's time in one step, and how often the host waited for it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    waiting = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense", "aten::nonzero")
    chosen = sorted(events, key=lambda event: -getattr(event, time_of))[:25]
    chosen += [event for event in events if event.key in waiting]
    return [{"name": event.key, "calls": event.count, "ms": getattr(event, time_of) / 1e3} for event in chosen]


def run_in_process(number: int, arguments: argparse.Namespace, save: Path) -> dict[str, Any]:
    """A row for case `number`; its status where it did not end well."""
    command = [sys.executable, *sys.argv, "--case", str(number), "--save", str(save)]
    try:
        done = subprocess.run(command, timeout=arguments.case_timeout_s, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return {"status": f"not done after {arguments.case_timeout_s:.0f} s"}
    if done.returncode == 0:
        return {"status": "ok", **json.loads(save.read_text())}
    if done.returncode == OUT_OF_MEMORY:
        return {"status": "out of memory"}
    print(done.stderr[-3000:], file=sys.stderr)
    return {"status": f"failed ({done.returncode})"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and what is predicted")
    parser.add_argument("--calls", type=int, default=10, help="timed steps of a case")
    parser.add_argument("--budget-s", type=float, default=430.0, help="start no case after this many seconds")
    parser.add_argument("--case-timeout-s", type=float, default=120.0)
    parser.add_argument("--profile", action="store_true", help="add the operations that take most time to the JSON")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/h200.json"))
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry_run:
        cases = list_cases(cuda=arguments.device == "cuda", tiny=arguments.tiny, everything=True)
        print_table([{**dataclasses.asdict(case), **_prediction(case)} for case in cases])
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny shows that the benchmark runs")
    cases = list_cases(cuda=arguments.device == "cuda", tiny=arguments.tiny)
    if arguments.case is not None:
        run_child(cases[arguments.case], arguments)
        return
    rows = measure_cases(cases, arguments)
    print_table([{name: value for name, value in row.items() if name != "profile"} for row in rows])
    decisions = decide(rows)
    print_table(decisions)
    run = describe_run(torch.device(arguments.device))
    write_json(arguments.output, {"run": run, "tiny": arguments.tiny, "rows": rows, "decisions": decisions})


def _prediction(case: Case) -> dict[str, float]:
    predicted = predicted_tokens_per_second(case)
    return {} if predicted is None else {"predicted tokens/s": predicted}


def run_child(case: Case, arguments: argparse.Namespace) -> None:
    try:
        row = run_case(case, arguments)
    except torch.cuda.OutOfMemoryError:
        sys.exit(OUT_OF_MEMORY)
    finally:
        distributed.destroy_process_group()
    arguments.save.write_text(json.dumps(row))


def measure_cases(cases: list[Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row each; ratios are to the plain step of the same batch."""
    start, rows = time.monotonic(), []
    plain: dict[tuple[int, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            if time.monotonic() - start > arguments.budget_s:
                result: dict[str, Any] = {"status": "not run: out of time"}
            else:
                result = run_in_process(number, arguments, Path(folder) / "row.json")
            speed = result.get("tokens/s")
            if case.step == "plain" and speed:
                plain[case.batch_size, case.positions] = speed
            rows.append({**dataclasses.asdict(case), **result, **_prediction(case)})
            print(f"{number + 1}/{len(cases)} {case}: {result['status']}", file=sys.stderr, flush=True)
    for row in rows:
        at = (row["batch_size"], row["positions"])
        if row.get("tokens/s") and at in plain:
            row["speedup"] = row["tokens/s"] / plain[at]
    return rows


if __name__ == "__main__":
    run_and_exit(main)
