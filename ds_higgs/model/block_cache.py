"""Keys and values of a whole speech in one block per layer, made once, so that no step copies what was there before."""

from typing import Any

import torch
from transformers.cache_utils import Cache


class BlockCache(Cache):
    """A past that is given its room beforehand, and shows attention no more of it than is filled.

    transformers' StaticCache shows all of its room at every step, which costs the CPU more than the speech itself.

    Args:
        room: columns for what comes after the first ones.
    """

    def __init__(self, *, room: int):
        super().__init__()
        self.filled = 0  # columns, by all layers; whoever runs the layers moves it on
        self._room = room
        self._blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a layer's new columns [batch, heads, columns, head_dim] behind the filled ones; all of them, as views."""
        new = (key_states, value_states)
        end = self.filled + key_states.shape[2]
        if layer_idx not in self._blocks:
            self._blocks[layer_idx] = self._make_block(key_states), self._make_block(value_states)
        for block, states in zip(self._blocks[layer_idx], new, strict=True):
            block[:, :, self.filled : end] = states
        key, value = (block[:, :, :end] for block in self._blocks[layer_idx])
        return key, value

    def _make_block(self, first: torch.Tensor) -> torch.Tensor:
        batch, heads, columns, width = first.shape
        return first.new_empty((batch, heads, columns + self._room, width))

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Columns that are filled."""
        return self.filled

    def get_max_cache_shape(self) -> int | None:
        """None: a model looks for graphs that were captured for a length, and none is for this."""
        return None
