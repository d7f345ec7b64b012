"""Save a DeepSpeed engine's trainable state and the run's position: complete or absent, never in between."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch

import ds_higgs.checkpoint.collective as collective
from ds_higgs.checkpoint.background import Background
from ds_higgs.checkpoint.deepspeed_parts import writes_through
from ds_higgs.checkpoint.folders import begin_partial, checkpoints_folder
from ds_higgs.checkpoint.marker import Marker
from ds_higgs.checkpoint.pending import Commit, PendingCheckpoint, at_once, on_rank_zero
from ds_higgs.checkpoint.trainable import engine_precision, list_trainable
from ds_higgs.checkpoint.writing import RecordingWriter

STATE_NAME = "state.json"
_VERSIONED_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "boson-multimodal", "numpy")


def rank_state_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def begin_checkpoint(
    engine,
    run_dir: Path,
    *,
    step: int,
    state: Mapping[str, object],
    rank_state: Mapping[str, object],
    commit: Commit,
    fixed: Mapping[str, object] | None = None,
    validation_loss: float | None = None,
    background: Background | None = None,
) -> PendingCheckpoint:
    """Begin `checkpoints/step-XXXXXXXX`. Called by every rank, between steps; so is all that it returns.

    The files go to a folder of another name, each is hashed and synced, the marker is written last, and a rename
    makes the checkpoint exist. Only then are older ones deleted.

    Args:
        state: JSON-able and the same on all ranks (position of the data, epoch, tokens seen, config).
        rank_state: tensors and JSON-able values of this rank (random generators).
        commit: what rank 0 does once all files are whole.
        fixed: what a resumed run may not change, by config key; `load_checkpoint` compares it.
        background: copy what is to be written, and leave the writing to it; None: everything is written on return.

    Raises:
        CheckpointSaveError: on every rank, where the folder could not be made.
    """
    assert commit.keep_latest >= 1, commit
    folder = checkpoints_folder(run_dir)
    partial = on_rank_zero(lambda: begin_partial(folder, step), folder)
    writer = RecordingWriter() if background is None else background.writer()
    _write_files(engine, writer, partial, state=state, rank_state=rank_state)
    marker = Marker(
        step=step,
        world_size=collective.world_size(),
        zero_stage=engine.zero_optimization_stage(),
        precision=engine_precision(engine),
        trainable=list_trainable(engine),
        fixed=dict(fixed or {}),
        validation_loss=validation_loss,
        versions={package: version(package) for package in _VERSIONED_PACKAGES},
        files={},
    )
    return PendingCheckpoint(partial, marker, writer, commit, at_once if background is None else background.submit)


def save_checkpoint(engine, run_dir: Path, *, keep_latest: int, **contents) -> Path:
    """`begin_checkpoint` with these `contents`, and wait for it.

    Args:
        keep_latest: how many to keep, beside the best by `validation_loss`.

    Raises:
        CheckpointSaveError: on every rank, naming the files that could not be written on any of them.
    """
    return begin_checkpoint(engine, run_dir, commit=Commit(keep_latest), **contents).finish()


def _write_files(
    engine,
    writer: RecordingWriter,
    partial: Path,
    *,
    state: Mapping[str, object],
    rank_state: Mapping[str, object],
) -> None:
    with writes_through(engine, writer):
        engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
    writer.save_bytes(encode_rank_state(rank_state), partial / rank_state_name(collective.rank()))
    if collective.rank() == 0:
        writer.save_bytes(json.dumps(state, indent=1).encode(), partial / STATE_NAME)


def encode_rank_state(rank_state: Mapping[str, object]) -> bytes:
    """Tensors as safetensors, everything else as JSON in its header."""
    tensors = {key: value for key, value in rank_state.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in rank_state.items() if key not in tensors}
    return safetensors.torch.save(tensors, metadata={"json": json.dumps(others)})
