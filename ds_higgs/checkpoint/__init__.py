"""Checkpoints that are complete or absent: saved atomically, verified before they are loaded, exact on resume."""

from ds_higgs.checkpoint.background import Background
from ds_higgs.checkpoint.finding import find_checkpoint, saved_stage
from ds_higgs.checkpoint.loading import load_checkpoint
from ds_higgs.checkpoint.pending import CheckpointSaveError, Commit, PendingCheckpoint
from ds_higgs.checkpoint.random_state import capture_random_state, reseed, restore_random_state
from ds_higgs.checkpoint.saving import begin_checkpoint, save_checkpoint

__all__ = [
    "Background",
    "CheckpointSaveError",
    "Commit",
    "PendingCheckpoint",
    "begin_checkpoint",
    "capture_random_state",
    "find_checkpoint",
    "load_checkpoint",
    "reseed",
    "restore_random_state",
    "save_checkpoint",
    "saved_stage",
]
