"""What a run tells: metrics.jsonl, the progress bar, and the trackers behind DeepSpeed's monitor."""

import json
import math
import resource
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from tqdm import tqdm

from ds_higgs.config import Config
from ds_higgs.data.loader import StepLoader
from ds_higgs.files import append_whole, read_json_lines, write_atomically
from ds_higgs.job import devices
from ds_higgs.job.logs import logger
from ds_higgs.model.loading import HiggsAudioConfig
from ds_higgs.run_folder import is_event
from ds_higgs.sizing.flops import peak_tokens_per_second
from ds_higgs.sizing.shape import model_shape
from ds_higgs.training.results import StepResult
from ds_higgs.training.save_errors import save_errors


class MetricsFile:
    """OUTPUT_DIR/metrics.jsonl: one JSON object a line, each with `event` and `step`; written by rank 0 alone.

    tolerate_errors: whether lines that cannot be written wait until they can be.
    """

    def __init__(self, path: Path, *, enabled: bool, tolerate_errors: bool = False):
        self.path = path
        self.enabled = enabled
        self.tolerate_errors = tolerate_errors
        self._waiting: list[bytes] = []

    def write(self, event: str, *, step: int, **values: Any) -> None:
        """Append one line. Numbers that are not finite become strings ("nan"), so that every line is valid JSON."""
        if not self.enabled:
            return
        line = json.dumps({"event": event, "step": step, **json_values(values)}, allow_nan=False)
        self._waiting.append(line.encode() + b"\n")
        with save_errors(tolerate=self.tolerate_errors):
            append_whole(self.path, b"".join(self._waiting))
            self._waiting.clear()

    def rewind(self, step: int, *, without: Collection[str] = ()) -> None:
        """Drop the lines after `step`, those `without` events at it, and with a warning those that are damaged."""
        if not self.enabled or not self.path.exists():
            return
        kept = [line for line in read_json_lines(self.path) if is_event(line) and _keep(line, step, without)]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


class StepTimer:
    """Wall time of optimizer steps, without what happens between them (validation, saving)."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`."""
        return time.perf_counter() - self._started


def step_values(
    result: StepResult, *, epoch: int, learning_rate: float, num_samples: int, num_tokens: int, seconds: float
) -> dict[str, Any]:
    """The values of a "step" line."""
    return {
        "epoch": epoch,
        **eval_values(result),
        "learning_rate": learning_rate,
        "grad_norm": result.grad_norm,
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "applied": result.applied,
        "step_time_s": seconds,
        "samples_per_second": num_samples / seconds,
        "tokens_per_second": num_tokens / seconds,
        "peak_memory_gib": peak_memory_gib(),
    }


def source_values(result: StepResult, loader: StepLoader) -> dict[str, dict[str, Any]]:
    """What a "step" line says of each source that the step had samples of: its epoch (from 1), samples and losses."""
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(loader.order.names):
        draws = [draw for draw in loader.drawn if draw.source == number]
        if draws:
            losses = eval_values(result.per_source[number])
            epoch = 1 + max(draw.epoch for draw in draws)
            found[name] = {"epoch": epoch, "num_samples": sum(len(draw.samples) for draw in draws), **losses}
    return found


def eval_values(result: StepResult) -> dict[str, Any]:
    """The values of an "eval" line."""
    kept = {} if result.keep_base is None else vars(result.keep_base)
    return {
        "loss": result.loss,
        "text_loss": result.text_loss,
        "audio_loss": result.audio_loss,
        "audio_loss_per_codebook": list(result.audio_loss_per_codebook),
        "num_text_targets": result.num_text_targets,
        "num_audio_targets": result.num_audio_targets,
        **{f"keep_base_{stream}": value for stream, value in kept.items() if value is not None},
    }


def peak_memory_gib() -> float:
    """The most memory this process has held, in GiB: of the GPU allocator, or resident where there is no GPU."""
    if devices.uses_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def find_peak(model_config: HiggsAudioConfig, config: Config, world_size: int) -> float | None:
    """Tokens a second of a job whose GPUs are at their peak; None on other devices, or where a part of it learns."""
    mode = config.train.mode
    if not devices.uses_cuda() or mode == "audio_path" or config.lora.trains_whole_layers:
        return None
    return peak_tokens_per_second(
        model_shape(model_config),
        device_name=torch.cuda.get_device_name(),
        num_devices=world_size,
        frozen=mode == "lora",
    )


def track(engine: DeepSpeedEngine, step: int, values: Mapping[str, float]) -> None:
    """Send values to the trackers that are switched on (TensorBoard, W&B, CSV), at x = `step`."""
    if engine.monitor.enabled:
        engine.monitor.write_events([(name, value, step) for name, value in values.items()])


def tolerate_tracker_errors(engine: DeepSpeedEngine) -> None:
    """Let the run go on where trackers cannot write: DeepSpeed's own events are in `step`, in the middle of a step."""
    write_events = engine.monitor.write_events

    def write_what_can_be(events: Sequence[tuple[str, float, int]]) -> None:
        with save_errors(tolerate=True):
            write_events(events)

    engine.monitor.write_events = write_what_can_be


class Progress:
    """A progress bar on a terminal, a line every `log_steps` elsewhere; on rank 0 alone."""

    def __init__(self, *, total_steps: int, done_steps: int, bar: bool, log_steps: int, enabled: bool):
        self.enabled = enabled
        self.log_steps = log_steps
        self.total_steps = total_steps
        show_bar = enabled and bar and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=done_steps, unit="step", disable=not show_bar, dynamic_ncols=True)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Show one optimizer step."""
        if not self.enabled:
            return
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {values['loss']:.3f} audio {values['audio_loss']:.3f}", refresh=False)
            self._bar.update(1)
        elif step % self.log_steps == 0 or step == self.total_steps:
            logger.info(
                "step %d/%d  epoch %d  loss %.4f  text %.4f  audio %.4f  lr %.2e  grad %.3f  %.0f tokens/s  %.1f GiB",
                step,
                self.total_steps,
                values["epoch"],
                values["loss"],
                values["text_loss"],
                values["audio_loss"],
                values["learning_rate"],
                values["grad_norm"],
                values["tokens_per_second"],
                values["peak_memory_gib"],
            )

    def close(self) -> None:
        self._bar.close()


def _keep(line: Mapping[str, Any], step: int, without: Collection[str]) -> bool:
    if line["step"] == step and line["event"] in without:
        return False
    return line["step"] <= step and line["event"] != "end"


def json_values(value: Any) -> Any:
    """The value with every number that is not finite as a string, as valid JSON wants it."""
    if isinstance(value, Mapping):
        return {key: json_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
