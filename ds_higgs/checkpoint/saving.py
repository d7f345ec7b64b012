"""Save a DeepSpeed engine's trainable state and the run's position: complete or absent, never in between."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch

import ds_higgs.checkpoint.collective as collective
from ds_higgs.checkpoint.folders import begin_partial, checkpoints_folder, publish, retain
from ds_higgs.checkpoint.marker import MARKER_NAME, FileRecord, Marker, encode_marker
from ds_higgs.checkpoint.trainable import engine_precision, list_trainable
from ds_higgs.checkpoint.writing import HashingFile, RecordingWriter, describe_os_error, recorded_writes

STATE_NAME = "state.json"
_VERSIONED_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "boson-multimodal", "numpy")


class CheckpointSaveError(OSError):
    """A checkpoint could not be written (full disk, read-only folder); the earlier ones are whole."""


def rank_state_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def save_checkpoint(
    engine,
    run_dir: Path,
    *,
    step: int,
    state: Mapping[str, object],
    rank_state: Mapping[str, object],
    keep_latest: int,
    fixed: Mapping[str, object] | None = None,
    validation_loss: float | None = None,
) -> Path:
    """Write `checkpoints/step-XXXXXXXX`, then delete what retention lets go. Called by every rank, between steps.

    The files go to a folder of another name, each is hashed and synced, the marker is written last, and a rename
    makes the checkpoint exist. Only then are older ones deleted.

    Args:
        state: JSON-able and the same on all ranks (position of the data, epoch, tokens seen, config).
        rank_state: tensors and JSON-able values of this rank (random generators).
        keep_latest: how many to keep, beside the best by `validation_loss`.
        fixed: what a resumed run may not change, by config key; `load_checkpoint` compares it.

    Raises:
        CheckpointSaveError: on every rank, naming the files that could not be written on any of them.
    """
    assert keep_latest >= 1, keep_latest
    folder = checkpoints_folder(run_dir)
    partial = _on_rank_zero(lambda: begin_partial(folder, step), folder)
    files = _write_files(engine, partial, state=state, rank_state=rank_state)
    marker = Marker(
        step=step,
        world_size=collective.world_size(),
        zero_stage=engine.zero_optimization_stage(),
        precision=engine_precision(engine),
        trainable=list_trainable(engine),
        fixed=dict(fixed or {}),
        validation_loss=validation_loss,
        versions={package: version(package) for package in _VERSIONED_PACKAGES},
        files=files,
    )
    return _on_rank_zero(lambda: _complete(partial, marker, keep_latest), folder)


def _write_files(
    engine, partial: Path, *, state: Mapping[str, object], rank_state: Mapping[str, object]
) -> dict[str, FileRecord]:
    with recorded_writes(engine) as writer:
        engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
        writer.save_bytes(encode_rank_state(rank_state), partial / rank_state_name(collective.rank()))
        if collective.rank() == 0:
            writer.save_bytes(json.dumps(state, indent=1).encode(), partial / STATE_NAME)
    return _merge_records(writer, partial)


def _merge_records(writer: RecordingWriter, partial: Path) -> dict[str, FileRecord]:
    """All ranks' files, once it is known that every rank could write its own."""
    gathered = collective.gather((writer.files, writer.problems))
    problems = [f"rank {rank}: {problem}" for rank, (_, found) in enumerate(gathered) for problem in found]
    if problems:
        _on_rank_zero(lambda: _discard(partial), partial)
        raise CheckpointSaveError(f"could not save {partial.name.removeprefix('.partial-')}: " + "; ".join(problems))
    return {name: record for files, _ in gathered for name, record in files.items()}


def _discard(partial: Path) -> None:
    for path in partial.iterdir():
        path.unlink()
    partial.rmdir()


def _complete(partial: Path, marker: Marker, keep_latest: int) -> Path:
    file = HashingFile(partial / MARKER_NAME)
    file.write(encode_marker(marker))
    file.finish()
    final = publish(partial, marker.step)
    retain(final.parent, newest=final, keep_latest=keep_latest)
    return final


def _on_rank_zero(action, path: Path):
    try:
        return collective.on_rank_zero(action)
    except OSError as error:
        raise CheckpointSaveError(f"could not save a checkpoint: {describe_os_error(error, path)}") from error


def encode_rank_state(rank_state: Mapping[str, object]) -> bytes:
    """Tensors as safetensors, everything else as JSON in its header."""
    tensors = {key: value for key, value in rank_state.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in rank_state.items() if key not in tensors}
    return safetensors.torch.save(tensors, metadata={"json": json.dumps(others)})
