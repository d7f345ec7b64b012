"""`ds_higgs` with something built in, for the fault tests.

FAULT is "RANK:CALL:KIND", done by that rank at that call of `train_step` in this process:
    raise, oom   an exception
    nan          a weight is NaN during this call
    stop         SIGTERM to itself: the run stops after its next step
"RANK:CALL:validation" is SIGTERM to itself as that validation begins.
RECORD is a folder: every rank writes there which samples it trained on, a line per step.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ds_higgs.cli.main import entry_point
from ds_higgs.training import evaluations, trainer

usual_step, usual_validation = trainer.train_step, evaluations.evaluate
calls, validations = 0, 0


def observed_step(engine: Any, micro_batches: list, *args: Any, **kwargs: Any) -> Any:
    global calls
    calls += 1
    if "RECORD" in os.environ:
        _record(engine.global_rank, [sample for batch in micro_batches for sample in batch.sample_ids])
    rank, call, kind = os.environ.get("FAULT", "0:0:none").split(":")
    if (engine.global_rank, calls) != (int(rank), int(call)) or kind == "validation":
        return usual_step(engine, micro_batches, *args, **kwargs)
    if kind == "nan":
        with _a_weight_is_nan(engine):
            return usual_step(engine, micro_batches, *args, **kwargs)
    _fail(kind)
    return usual_step(engine, micro_batches, *args, **kwargs)


def observed_validation(engine: Any, *args: Any) -> Any:
    global validations
    validations += 1
    if os.environ.get("FAULT") == f"{engine.global_rank}:{validations}:validation":
        os.kill(os.getpid(), signal.SIGTERM)
    return usual_validation(engine, *args)


def _record(rank: int, samples: list[str]) -> None:
    with (Path(os.environ["RECORD"]) / f"{os.getpid()}-{rank}.jsonl").open("a") as file:
        file.write(json.dumps(samples) + "\n")


def _fail(kind: str) -> None:
    if kind == "raise":
        raise ArithmeticError("a fault that was built in")
    if kind == "oom":
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert kind == "stop", kind
    # The trainer asked for requests before this call: this step does not know of it, the next one does.
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _a_weight_is_nan(engine: Any) -> Iterator[None]:
    weight = next(p for p in engine.module.parameters() if p.requires_grad).data.view(-1)
    usual = weight[0].clone()
    weight[0] = float("nan")
    yield
    weight[0] = usual


trainer.train_step = observed_step
evaluations.evaluate = observed_validation

if __name__ == "__main__":
    entry_point()
