"""Encode clips of unequal length so that no clip's codes depend on the clips beside it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ds_higgs.data.codec.source import CodecSource, pad_to_hop

MAX_BATCH_SAMPLES = 24000 * 120  # of one forward pass on an accelerator: two minutes at 24 kHz


class BatchedCodec(ABC):
    """An AudioCodec but for its model: what `source` tells of it, and encoding in batches of one length."""

    def __init__(self, source: CodecSource, *, device: torch.device | str):
        self.identity = source.identity
        self.sampling_rate = source.sampling_rate
        self.hop_length = source.hop_length
        self.num_codebooks = source.num_codebooks
        self.codebook_size = source.codebook_size
        self.device = torch.device(device)

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """See AudioCodec."""
        codes = dict(self.encode_each(waveforms))
        return [codes[index] for index in range(len(waveforms))]

    def encode_each(self, waveforms: Sequence[np.ndarray]) -> Iterator[tuple[int, torch.Tensor]]:
        """See AudioCodec."""
        return encode_by_length(waveforms, self._encode_batch, hop_length=self.hop_length, device=self.device)

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """See AudioCodec."""

    @abstractmethod
    def _encode_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """[batch, samples] float32 on `device` -> [batch, codebooks, frames] codes."""


@torch.no_grad()
def encode_by_length(
    waveforms: Sequence[np.ndarray],
    encode_batch: Callable[[torch.Tensor], torch.Tensor],
    *,
    hop_length: int,
    device: torch.device,
) -> Iterator[tuple[int, torch.Tensor]]:
    """The place of each waveform and its codes, batch by batch.

    Padding a batch would change the codes near the end of its shorter clips. So each clip is padded by itself, to a
    whole number of frames, and only clips that are then of equal length share a batch. On the CPU, where a batch is no
    faster than its clips one by one, each clip is a batch of its own: the codes are then equal to the bit.

    Args:
        encode_batch: [batch, samples] float32 on `device` -> [batch, codebooks, frames] codes.
    """
    padded = [pad_to_hop(waveform, hop_length) for waveform in waveforms]
    for members in _batches(padded, one_by_one=device.type == "cpu"):
        batch = torch.from_numpy(np.stack([padded[member] for member in members])).to(device)
        for member, encoded in zip(members, encode_batch(batch).cpu(), strict=True):
            assert encoded.shape[1] == len(padded[member]) // hop_length
            yield member, encoded.long()


def _batches(padded: list[np.ndarray], *, one_by_one: bool) -> list[list[int]]:
    if one_by_one:
        return [[index] for index in range(len(padded))]
    by_length: dict[int, list[int]] = {}
    for index, waveform in enumerate(padded):
        by_length.setdefault(len(waveform), []).append(index)
    batches = []
    for length, members in by_length.items():
        size = max(1, MAX_BATCH_SAMPLES // max(1, length))
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches
