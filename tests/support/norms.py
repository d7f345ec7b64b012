"""Gives a base checkpoint's norms weights of their own: untrained ones are all 1, and hide that two are mixed up."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def randomise_norms(base: Path) -> None:
    """Draw the weights of every norm from [0.5, 1.5), other ones for text and audio, in place."""
    path = base / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weights[name] = 0.5 + torch.rand(weight.shape, generator=generator, dtype=weight.dtype)
    save_file(weights, path, metadata={"format": "pt"})
