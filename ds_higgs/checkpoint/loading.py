"""Load a verified checkpoint into a DeepSpeed engine, strictly, without letting it override the config."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from torch.optim.lr_scheduler import LambdaLR

import ds_higgs.checkpoint.collective as collective
from ds_higgs.checkpoint.advice import OTHER_CHECKPOINT, OTHER_SETTINGS
from ds_higgs.checkpoint.deepspeed_parts import reads_through
from ds_higgs.checkpoint.finding import verify_checkpoint
from ds_higgs.checkpoint.marker import Marker, read_marker
from ds_higgs.checkpoint.pt_files import PtReader
from ds_higgs.checkpoint.resharding import resharded_reads
from ds_higgs.checkpoint.saving import STATE_NAME, rank_state_name
from ds_higgs.checkpoint.trainable import check_same_trainable, engine_precision, list_trainable
from ds_higgs.errors import UserError

# What of a param group is configured: the config's values win.
_HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")


def load_checkpoint(
    engine, path: Path, *, fixed: Mapping[str, object] | None = None, fixed_before: Mapping[str, object] | None = None
) -> tuple[dict, dict | None]:
    """Bring `engine` to where `save_checkpoint` left it. Called by every rank.

    Learning rate, betas, weight decay and clipping stay as the engine was configured.

    Args:
        fixed: what may not differ from the checkpoint's, by config key; not compared when None.
        fixed_before: what a checkpoint that does not name such a key means by that.

    Returns:
        `state` as it was saved, and this rank's `rank_state`, or None where the number of ranks changed.

    Raises:
        UserError: the checkpoint is incomplete, damaged or asks to run code (naming the file), or is of another base
            checkpoint, LoRA shape, ZeRO stage or precision (naming each difference).
    """
    if problems := verify_checkpoint(path):
        raise UserError.from_problems(f"the checkpoint {path} cannot be used:", problems, advice=OTHER_CHECKPOINT)
    marker = read_marker(path)
    _check_fits(engine, marker, path, fixed, fixed_before or {})
    same_ranks = marker.world_size == collective.world_size()
    view = reads_through(engine, PtReader()) if same_ranks else resharded_reads(engine, path, marker.world_size)
    with _configured_values_kept(engine), view:
        engine.load_checkpoint(str(path.parent), tag=path.name, custom_load_fn=_StrictLoad(marker))
    rank_state = decode_rank_state(path / rank_state_name(collective.rank())) if same_ranks else None
    return json.loads((path / STATE_NAME).read_bytes()), rank_state


def decode_rank_state(path: Path) -> dict:
    """Undo `encode_rank_state`."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        return {**tensors, **json.loads(file.metadata()["json"])}


class _StrictLoad:
    """DeepSpeed's hook for the module's weights: all trainable keys of the checkpoint, and buffers, nothing else."""

    def __init__(self, marker: Marker):
        self._trainable = {name for name, _ in marker.trainable}

    def __call__(self, *, src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
        incompatible = dst.load_state_dict(src, strict=False)
        missing = sorted(self._trainable & set(incompatible.missing_keys))
        if missing or incompatible.unexpected_keys:
            raise UserError(
                f"the checkpoint's weights do not fit: missing {missing}, unexpected {incompatible.unexpected_keys}"
            )


def _check_fits(
    engine, marker: Marker, path: Path, fixed: Mapping[str, object] | None, fixed_before: Mapping[str, object]
) -> None:
    saved = {"zero.stage": marker.zero_stage, "zero.precision": marker.precision}
    now: dict = {"zero.stage": engine.zero_optimization_stage(), "zero.precision": engine_precision(engine)}
    if fixed is not None:
        saved |= {**fixed_before, **marker.fixed}
        now |= json.loads(json.dumps(fixed))  # tuples become lists, as they did in the marker
    differences = [
        f"{key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted(set(saved) | set(now))
        if saved.get(key) != now.get(key)
    ]
    if differences:
        title = f"{path} was saved with other settings, which may not change:"
        raise UserError.from_problems(title, differences, advice=OTHER_SETTINGS)
    same_ranks = marker.world_size == collective.world_size()
    check_same_trainable(saved=marker.trainable, current=list_trainable(engine), ordered=same_ranks, where=str(path))


@contextmanager
def _configured_values_kept(engine) -> Iterator[None]:
    """DeepSpeed's load takes learning rate, decay and clipping from the checkpoint: put the config's back."""
    groups = engine.optimizer.param_groups
    configured = [{key: group[key] for key in _HYPERPARAMETERS if key in group} for group in groups]
    clip_grad = getattr(engine.optimizer, "clip_grad", None)
    base_rates = list(engine.lr_scheduler.base_lrs) if engine.lr_scheduler is not None else []
    yield
    for group, values in zip(engine.optimizer.param_groups, configured, strict=True):
        group.update(values)
    if clip_grad is not None:
        engine.optimizer.clip_grad = clip_grad
    if engine.lr_scheduler is not None:
        _schedule_again(engine, base_rates)


def _schedule_again(engine, base_rates: list[float]) -> None:
    """The configured schedule's rates at the step that the checkpoint's scheduler had reached."""
    scheduler = engine.lr_scheduler
    assert isinstance(scheduler, LambdaLR), type(scheduler)
    scheduler.base_lrs[:] = base_rates
    for group, factor, base_rate in zip(engine.optimizer.param_groups, scheduler.lr_lambdas, base_rates, strict=True):
        group["lr"] = base_rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in engine.optimizer.param_groups]
