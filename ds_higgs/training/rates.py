"""The learning rate of each trained weight, as the optimizer's groups."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

_WHOLE_BESIDE_LORA = re.compile(r"\.modules_to_save\.")
_LORA_B = re.compile(r"\.lora_(?:embedding_)?B\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# What comes before the first layer.
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|audio_codebook_embeddings|audio_out_embed_projector|audio_tower|audio_encoder_proj)\."
)


def parameter_groups(
    weights: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    whole_learning_rate: float | None = None,
    loraplus_lr_ratio: float,
    layer_decay: float,
    num_layers: int,
) -> list[Any]:
    """The optimizer's parameters: as they come where all learn at one rate, else a group for each rate.

    The first group is the one with `learning_rate` itself; the others follow from the fastest to the slowest.

    Args:
        weights: trained ones, by name.
        whole_learning_rate: of what is trained whole beside LoRA; None: `learning_rate`.
        loraplus_lr_ratio: rate of LoRA's B over that of A (LoRA+, arXiv 2402.12354).
        layer_decay: factor from each layer to the one below it; the heads and the last norm have 1.
    """
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, weight in weights:
        own = whole_learning_rate if whole_learning_rate and _WHOLE_BESIDE_LORA.search(name) else learning_rate
        ratio = loraplus_lr_ratio if _LORA_B.search(name) else 1.0
        groups[ratio * layer_decay ** _layers_above(name, num_layers) * own].append(weight)
    if set(groups) == {learning_rate}:
        return groups[learning_rate]
    rates = sorted(groups, key=lambda rate: (rate != learning_rate, -rate))
    return [{"params": groups[rate], "lr": rate} for rate in rates]


def _layers_above(name: str, num_layers: int) -> int:
    """How many layers are between a weight and the heads, its own one counted."""
    if (layer := _LAYER.search(name)) is not None and "audio_tower." not in name:
        return num_layers - int(layer[1])
    return num_layers + 1 if _EMBEDDINGS.search(name) else 0
