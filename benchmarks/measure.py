"""Times and peak memory of a function, and results as a table and as JSON with machine, versions and command."""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ds_higgs.sizing import flops

GIB = 2**30
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "boson-multimodal", "liger-kernel", "flash-attn")


def time_calls(function: Callable[[], object], *, calls: int, warmup: int, device: torch.device) -> dict[str, float]:
    """Seconds of a call: p20, p50, p80 over `calls` calls, after `warmup` ones that do not count."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(calls):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    return {
        "p20_s": seconds[int(0.2 * (calls - 1))],
        "p50_s": statistics.median(seconds),
        "p80_s": seconds[round(0.8 * (calls - 1))],
    }


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the process's high-water mark to its present size


def peak_memory_gib(device: torch.device) -> float:
    """Since `reset_peak_memory`: allocated on a CUDA device, resident in the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return _process_status_kib("VmHWM") * 1024 / GIB


def memory_gib(device: torch.device) -> float:
    """Now, in the sense of `peak_memory_gib`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    return _process_status_kib("VmRSS") * 1024 / GIB


def _process_status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, None where it is not known."""
    if device.type != "cuda":
        return None
    return flops.peak_flops(torch.cuda.get_device_name(device))


def describe_run(device: torch.device) -> dict[str, Any]:
    """Machine, versions, command and time of this run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": name,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "load_average": os.getloadavg()[0],  # of one minute: more than the cores means that others worked here too
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def gradient_error(results: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """How far all gradients together, "grad/..." of each, are from the reference's, relative to those."""
    found, expected = (
        torch.cat([source[name].double().flatten() for name in sorted(reference) if name.startswith("grad/")])
        for source in (results, reference)
    )
    return float((found - expected).norm() / expected.norm())


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print dictionaries as a Markdown table; a key that a row lacks stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_format(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}")
