"""AdamW's update of offloaded fp32 masters on the CPU: torch's own, fused and not, against DeepSpeed's CPU Adam.

python benchmarks/offload.py [--millions 40]      # DeepSpeed's is compiled first: needs g++ and ninja
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import describe_run, print_table, write_json

SETTINGS = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def optimizers() -> dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]:
    """Ways to make one, by name."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return {
        "torch, fused": lambda masters: torch.optim.AdamW(masters, fused=True, **SETTINGS),
        "torch, one by one": lambda masters: torch.optim.AdamW(masters, foreach=False, **SETTINGS),
        "DeepSpeed": lambda masters: DeepSpeedCPUAdam(masters, **SETTINGS),
    }


def build(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], elements: int) -> torch.optim.Optimizer:
    """An optimizer of one flat group, as ZeRO has it, with its gradient."""
    generator = torch.Generator().manual_seed(0)
    masters = torch.randn(elements, generator=generator).requires_grad_()
    masters.grad = torch.randn(elements, generator=generator)
    return make([masters])


def seconds_of(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=40, help="of weights")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "offload.json")
    arguments = parser.parse_args()
    device, built = torch.device("cpu"), {}
    for name, make in optimizers().items():
        built[name] = build(make, arguments.millions * 10**6)
    rows = []
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(arguments.calls):
        for name, optimizer in built.items():
            seconds[name].append(seconds_of(optimizer.step))
    for name, (_, *counted) in seconds.items():  # the first call makes the moments
        times = {"least_s": min(counted), "p50_s": statistics.median(counted)}  # the least: whatever else goes on
        rows.append({"optimizer": name, "million_weights": arguments.millions, **times})
    print_table(rows)
    expected = built["torch, fused"].param_groups[0]["params"][0]
    for name, optimizer in built.items():
        error = (optimizer.param_groups[0]["params"][0] - expected).abs().max().item()
        assert error < arguments.calls * 2**-21, (name, error)  # all are AdamW: weights up to 8, rounded at each update
    write_json(arguments.output, {"run": describe_run(device), "rows": rows})


if __name__ == "__main__":
    main()
