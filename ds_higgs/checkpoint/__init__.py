"""Checkpoints that are complete or absent: saved atomically, verified before they are loaded, exact on resume."""

from ds_higgs.checkpoint.finding import find_checkpoint
from ds_higgs.checkpoint.loading import load_checkpoint
from ds_higgs.checkpoint.random_state import capture_random_state, reseed, restore_random_state
from ds_higgs.checkpoint.saving import CheckpointSaveError, save_checkpoint

__all__ = [
    "CheckpointSaveError",
    "capture_random_state",
    "find_checkpoint",
    "load_checkpoint",
    "reseed",
    "restore_random_state",
    "save_checkpoint",
]
