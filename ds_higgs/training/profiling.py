"""A trace of a run's optimizer steps, for Perfetto or chrome://tracing, and the operations that take most time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from ds_higgs.job import devices

WAIT, WARM_UP = 1, 1  # the first steps allocate and compile
MOST_EXPENSIVE = 30


@contextmanager
def profiling(folder: Path, *, steps: int) -> Iterator[Callable[[], None]]:
    """Trace `steps` optimizer steps, from the third on, into `folder`, none for 0; gives what to call after a step."""
    if steps == 0:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if devices.uses_cuda() else [])]
    when = schedule(wait=WAIT, warmup=WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=partial(_write, folder)) as profiler:
        yield profiler.step


def _write(folder: Path, profiler: profile) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    by = "self_device_time_total" if devices.uses_cuda() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=MOST_EXPENSIVE)
    (folder / "operations.txt").write_text(table + "\n", encoding="utf-8")
