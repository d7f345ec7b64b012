"""A training step at the released model's shapes on a simulated GPU: kernels, waits, memory and the time they predict.

    python benchmarks/simulate.py                # peak memory of 24 settings against `ds-higgs estimate`, and tokens/s
    python benchmarks/simulate.py --operations   # where the predicted time of 16 x 500 goes
    python benchmarks/simulate.py --layers 3     # quicker, and without meaning for memory and speed

Nothing is computed (see `simulated_cuda.py`). Predicted times count, for every kernel, the larger of its FLOPs over
790 TFLOP/s (the measured peak of large bf16 products on an H200), its bytes over 85 % of 4.8 TB/s, and 2 us; a step
takes that, or, if the host is slower, 5 us a launch and 30 us a call of what torch.compile made. They are predictions;
nothing here was measured on a GPU.
"""

from simulated_step import Setting, Simulated, host_seconds, kernel_seconds, simulate  # isort: skip  (before torch)

import argparse
import dataclasses
import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from measure import GIB, describe_run, print_table, write_json
from simulated_work import H200, Work
from workload import active_parameters

from ds_higgs.model.loading import released_model_config
from ds_higgs.sizing.estimator import CHECKPOINTING_CHOICES, describe_checkpointing
from ds_higgs.sizing.flops import PEAK_FLOPS

BATCH_SIZES = (2, 8, 16)
VARIANTS: dict[str, dict[str, Any]] = {
    "torch": {},
    "liger": {"kernels": "liger"},
    "compiled": {"compiled": True},
    "compiled, varlen": {"compiled": True, "varlen": True},
}
POSITIONS = (500, 2000)


def memory_rows(layers: int | None) -> list[dict[str, Any]]:
    """Simulated and estimated peak of every batch size, length and checkpointing policy."""
    rows = []
    for positions in POSITIONS:
        for batch_size in BATCH_SIZES:
            for recompute in CHECKPOINTING_CHOICES:
                found = simulate(Setting(batch_size, positions, recompute, layers))
                rows.append(_row(batch_size, positions, recompute, found))
                print(rows[-1], file=sys.stderr, flush=True)
                gc.collect()
    return rows


def variant_rows() -> list[dict[str, Any]]:
    """Predicted speed of each way to run a layer, no layer recomputed; of 2 and 3 layers, the rest as the third."""
    rows = []
    for name, variant in VARIANTS.items():
        for positions in POSITIONS:
            for batch_size in BATCH_SIZES:
                rows.append(_variant_row(name, Setting(batch_size, positions, **variant)))
                print(rows[-1], file=sys.stderr, flush=True)
                gc.collect()
    return rows


def _variant_row(name: str, setting: Setting) -> dict[str, Any]:
    config = released_model_config()
    two, three = (simulate(dataclasses.replace(setting, layers=number)) for number in (2, 3))
    layer = _difference(three, two)
    more = config.text_config.num_hidden_layers - 3
    work = {kind: one.plus(layer[kind], more) for kind, one in three.work.items()}
    seconds = max(kernel_seconds(work), host_seconds(work))
    tokens_per_second = three.num_tokens / seconds
    return {
        "layer": name,
        "batch": setting.batch_size,
        "positions": setting.positions,
        "kernels a layer": three.kernels - two.kernels,
        "kept_bytes a layer and position": round((three.kept_bytes - two.kept_bytes) / three.num_tokens),
        "bound by": "GPU" if seconds == kernel_seconds(work) else "host",
        "predicted tokens/s": round(tokens_per_second),
        "predicted mfu": 4 * active_parameters(config) * tokens_per_second / PEAK_FLOPS["H200"],
    }


def _difference(three: Simulated, two: Simulated) -> dict[tuple[str, str], Work]:
    return {kind: work.plus(two.work.get(kind, Work()), -1) for kind, work in three.work.items()}


def _row(batch_size: int, positions: int, recompute: int | None, found: Simulated) -> dict[str, Any]:
    config = released_model_config()
    flops = 4 * active_parameters(config) * found.tokens_per_second
    return {
        "batch": batch_size,
        "positions": positions,
        "checkpointing": describe_checkpointing(recompute),
        "simulated_gib": found.peak_bytes / GIB,
        "estimated_gib": found.estimated_bytes / GIB,
        "estimated / simulated": found.estimated_bytes / found.peak_bytes,
        "kernels": found.kernels,
        "waits": len(found.forward_waits) + len(found.backward_waits),
        "predicted tokens/s": round(found.tokens_per_second),
        "predicted mfu": flops / PEAK_FLOPS["H200"],
    }


def operation_rows(setting: Setting) -> list[dict[str, Any]]:
    """Where the predicted time of a step goes: operations of all layers, and of what is outside them, longest first.

    What the first layer does not do, as its input needs no gradient, is less than none outside.
    """
    layers = released_model_config().text_config.num_hidden_layers
    two, three = (simulate(dataclasses.replace(setting, layers=number)) for number in (2, 3))
    in_layer = _difference(three, two)
    outside = {kind: work.plus(in_layer.get(kind, Work()), -2) for kind, work in two.work.items()}
    found = [("layers", kind, Work().plus(work, layers)) for kind, work in in_layer.items()]
    found += [("outside", kind, work) for kind, work in outside.items()]
    total = sum(work.seconds for _, _, work in found)
    return [
        {
            "where": where,
            "operation": name.removeprefix("aten.").removesuffix(".default"),
            "shapes": shapes,
            "launches": work.launches,
            "bound by": "FLOPs" if work.flops / H200.flops * 1.001 >= work.seconds else "bytes",
            "ms": 1e3 * work.seconds,
            "share": work.seconds / total,
        }
        for where, (name, shapes), work in sorted(found, key=lambda one: -one[2].seconds)
        if work.launches
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of the released model's 28")
    parser.add_argument("--operations", action="store_true", help="print where the time of a step goes, and no more")
    parser.add_argument("--batch-size", type=int, default=16, help="for --operations")
    parser.add_argument("--positions", type=int, default=500, help="for --operations")
    parser.add_argument("--kernels", default="torch", choices=("plain", "torch", "liger"), help="for --operations")
    parser.add_argument("--compiled", action="store_true", help="for --operations")
    parser.add_argument("--varlen", action="store_true", help="for --operations")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/simulated_h200.json"))
    arguments = parser.parse_args()
    if arguments.operations:
        shape = arguments.batch_size, arguments.positions
        parts = {name: getattr(arguments, name) for name in ("kernels", "compiled", "varlen")}
        print_table(operation_rows(Setting(*shape, **parts)))
        return 0
    variants = variant_rows()
    rows = memory_rows(arguments.layers)
    print_table(rows)
    print_table(variants)
    write_json(arguments.output, {"run": describe_run(torch.device("cpu")), "rows": rows, "variants": variants})
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # see simulated_cuda.py
