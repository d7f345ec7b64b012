"""How a base checkpoint lays audio out in its sequence, how many positions that takes, and the expanded sequence.

HiggsAudioModel replaces every audio placeholder by its frames inside its forward, where on a GPU every size that
depends on data makes the host wait. `expand` does it on the CPU, where sizes are known, without embedding anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

STREAM_BOS_AND_EOS = 2
WHISPER_RATE = 16000
WHISPER_SECONDS = 30  # the longest reference audio that becomes one placeholder's features
ROUND_TO = 8  # columns of an expanded sequence: as HiggsAudioModel pads in training
MEL_HOP = 160  # samples at WHISPER_RATE per mel frame

Count = TypeVar("Count", int, np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class AudioLayout:
    """How a base checkpoint lays audio out in its sequence; the collator's settings.

    audio_in_tokens: whether reference audio enters as codes.
    whisper: whether it enters as Whisper features too.
    mel_bins: of the Whisper features.
    whisper_folder: with a preprocessor_config.json for them; None takes Whisper's published parameters.
    """

    audio_in_token: int
    audio_out_token: int
    pad_token: int
    stream_bos: int
    stream_eos: int
    num_codebooks: int
    codebook_size: int
    delay_pattern: bool
    audio_in_tokens: bool
    whisper: bool = False
    mel_bins: int = 128
    whisper_folder: Path | None = None

    @classmethod
    def from_config(
        cls, config: Any, *, use_delay_pattern: bool | None = None, encode_whisper_embed: bool | None = None
    ) -> "AudioLayout":
        """The layout of a HiggsAudioConfig; None takes what the config says."""
        folder = Path(config.name_or_path) if config.name_or_path else None
        has_own = folder is not None and (folder / "preprocessor_config.json").is_file()
        return cls(
            audio_in_token=config.audio_in_token_idx,
            audio_out_token=config.audio_out_token_idx,
            pad_token=config.pad_token_id,
            stream_bos=config.audio_stream_bos_id,
            stream_eos=config.audio_stream_eos_id,
            num_codebooks=config.audio_num_codebooks,
            codebook_size=config.audio_codebook_size,
            delay_pattern=config.use_delay_pattern if use_delay_pattern is None else use_delay_pattern,
            audio_in_tokens=config.encode_audio_in_tokens,
            whisper=config.encode_whisper_embed if encode_whisper_embed is None else encode_whisper_embed,
            mel_bins=config.audio_encoder_config.num_mel_bins,
            whisper_folder=folder if has_own else None,
        )

    def audio_targets(self, tokens: np.ndarray, supervised: np.ndarray) -> np.ndarray:
        """For each clip, in order, whether it is learned: [num_clips] bool.

        Args:
            tokens: [num_tokens]; supervised: [num_tokens] bool.
        """
        return supervised[(tokens == self.audio_in_token) | (tokens == self.audio_out_token)]

    def stream_length(self, num_frames: Count) -> Count:
        """Positions that a clip of `num_frames` code frames takes: stream BOS and EOS, and the delay."""
        return num_frames + STREAM_BOS_AND_EOS + (self.num_codebooks - 1 if self.delay_pattern else 0)

    def count_positions(self, tokens: np.ndarray, frames: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Positions that each token takes in the model: a placeholder gives way to its codes and Whisper features.

        Args:
            tokens: [num_tokens]; frames, seconds: [num_clips], code frames and length of each placeholder's audio.

        Returns:
            [num_tokens] int64.
        """
        placeholder = (tokens == self.audio_in_token) | (tokens == self.audio_out_token)
        is_input = tokens[placeholder] == self.audio_in_token
        codes = self.stream_length(frames)
        if self.whisper:
            samples = np.ceil(np.round(seconds * WHISPER_RATE, 3))
            features = whisper_positions(np.ceil(samples / MEL_HOP).astype(np.int64))
            inputs = features + codes if self.audio_in_tokens else features
        else:
            inputs = codes if self.audio_in_tokens else np.ones_like(codes)  # else nothing takes the token's place
        positions = np.ones(len(tokens), dtype=np.int64)
        positions[placeholder] = np.where(is_input, inputs, codes)
        return positions


def whisper_positions(mel_frames: Count) -> Count:
    """Positions that the audio tower makes of so many mel frames (its convolution and pooling halve them twice)."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1


@dataclass(frozen=True)
class _Tensors:
    """A dataclass of tensors and plain values, whose tensors move together."""

    def each(self, function: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
        """A copy with `function` applied to every value of `kind`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{n: function(value) if isinstance(value, kind) else value for n, value in values.items()})


@dataclass(frozen=True)
class RowOrder(_Tensors):
    """Where the rows of a batch, text rows first, then audio rows, come from and belong.

    num_text, num_audio: sizes of the two blocks; rows = num_text + num_audio.
    source: [rows] int64, indices into the flattened [batch * length] sequence; each block in order.
    grid_slot: [rows] int64, indices into the cells that attention works on: the flattened right-padded grid
        [batch * grid_length].
    row_of_cell: [cells] int64, the inverse of `grid_slot`; -1 in the padding.
    positions: [rows] int64, from 0 in every sample.
    """

    num_text: int
    num_audio: int
    batch_size: int
    grid_length: int
    source: torch.Tensor
    grid_slot: torch.Tensor
    row_of_cell: torch.Tensor
    positions: torch.Tensor

    def without_padding(self) -> tuple["RowOrder", torch.Tensor]:
        """The same rows on a grid that is one sample after another, and where each begins, [batch_size + 1] int32.

        `grid_length` stays the longest sample's. The host waits for nothing.
        """
        lengths = (self.row_of_cell.view(self.batch_size, -1) >= 0).sum(dim=1)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        slot = ends[self.grid_slot // self.grid_length] + self.grid_slot % self.grid_length
        row_of_cell = torch.empty_like(slot).index_copy_(0, slot, torch.arange(len(slot), device=slot.device))
        values = {field.name: getattr(self, field.name) for field in fields(RowOrder)}
        return RowOrder(**{**values, "grid_slot": slot, "row_of_cell": row_of_cell}), ends.to(torch.int32)


def order_rows(padding_mask: torch.Tensor, audio_mask: torch.Tensor, position_ids: torch.Tensor) -> RowOrder:
    """Sort a batch's positions; on a device, the host waits for it once.

    Args:
        padding_mask: [batch, length], non-zero where there is a token or frame.
        audio_mask: [batch, length] bool, True where there is a frame.
        position_ids: [batch, length] int64, from 0 in every sample.
    """
    batch_size, length = padding_mask.shape
    real = padding_mask.bool()
    kind = torch.where(real, audio_mask.long(), 2).flatten()  # 0 text, 1 audio, 2 padding
    order = kind.argsort(stable=True)
    sizes = torch.stack([(real & ~audio_mask).sum(), (real & audio_mask).sum(), real.sum(dim=1).max()])
    num_text, num_audio, grid_length = sizes.tolist()
    source = order[: num_text + num_audio]
    positions = position_ids.flatten().index_select(0, source)
    grid_slot = source // length * grid_length + positions
    row_of_cell = torch.full((batch_size * grid_length,), -1, device=source.device)
    row_of_cell[grid_slot] = torch.arange(len(source), device=source.device)
    return RowOrder(num_text, num_audio, batch_size, grid_length, source, grid_slot, row_of_cell, positions)


@dataclass(frozen=True)
class ExpandedSequence(RowOrder):
    """What HiggsAudioModel merges, ready, with the order of its rows.

    input_ids, attention_mask, position_ids: [batch, length] int64, as the model's own merging gives them.
    audio_in_mask, audio_out_mask: [batch, length] bool.
    text_tokens: [num_text_tokens] int64, indices into the flattened [batch * seq] input ids, padding included.
    cells: [num_text_tokens + frames] int64, indices into the flattened [batch * length] sequence: of those tokens, of
        the audio-in frames, of the audio-out frames.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    audio_in_mask: torch.Tensor
    audio_out_mask: torch.Tensor
    text_tokens: torch.Tensor
    cells: torch.Tensor


def expand(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    audio_in_lengths: torch.Tensor,
    audio_out_lengths: torch.Tensor,
    placeholder_ids: tuple[int, int],
    pad_id: int,
) -> ExpandedSequence:
    """Expand every placeholder, as HiggsAudioModel does in training without Whisper features; on the CPU.

    Args:
        input_ids, attention_mask: [batch, seq].
        audio_in_lengths, audio_out_lengths: frames of every placeholder of each kind, in order.
        placeholder_ids: token ids of <|AUDIO|> and <|AUDIO_OUT|>.
    """
    is_in, is_out = (input_ids == placeholder for placeholder in placeholder_ids)
    counts = torch.ones_like(input_ids)
    counts[is_in], counts[is_out] = audio_in_lengths, audio_out_lengths
    token, row, column = _place(counts)
    real = (attention_mask.bool() | is_in | is_out).flatten()[token]
    first, last = _used_columns(column[real], left_padded=len(input_ids) == 1)
    used = (column >= first) & (column < last)
    token, cell = token[used], (row * (last - first) + column - first)[used]

    shape = (len(input_ids), last - first)
    in_cells, out_cells = (cell[kind.flatten()[token]] for kind in (is_in, is_out))
    is_text = ~(is_in | is_out).flatten()[token]
    text_tokens, text_cells = token[is_text], cell[is_text]
    mask = _filled(shape, 0, text_cells, attention_mask.flatten()[text_tokens])
    mask.flatten()[torch.cat([in_cells, out_cells])] = 1
    ids = _filled(shape, pad_id, text_cells, input_ids.flatten()[text_tokens])
    for placeholder, cells in zip(placeholder_ids, (in_cells, out_cells), strict=True):
        ids.flatten()[cells] = placeholder
    audio_in_mask, audio_out_mask = (_filled(shape, False, cells, True) for cells in (in_cells, out_cells))
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    return ExpandedSequence(
        **vars(order_rows(mask, audio_in_mask | audio_out_mask, position_ids)),
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids,
        audio_in_mask=audio_in_mask,
        audio_out_mask=audio_out_mask,
        text_tokens=text_tokens,
        cells=torch.cat([text_cells, in_cells, out_cells]),
    )


def _place(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token, the row and the column of every cell, when tokens [batch, seq] take `counts` columns each.

    A single sample is padded on the left, several on the right, as the model does.
    """
    batch_size, seq = counts.shape
    ends = counts.cumsum(dim=1)
    starts = ends - counts
    if batch_size == 1:
        starts = starts + _round_up(int(ends[0, -1])) - ends[0, -1]
    token = torch.arange(batch_size * seq).repeat_interleave(counts.flatten())
    before = counts.flatten().cumsum(0) - counts.flatten()
    return token, token // seq, starts.flatten()[token] + torch.arange(token.numel()) - before[token]


def _used_columns(columns: torch.Tensor, *, left_padded: bool) -> tuple[int, int]:
    """The first column and the one after the last, when the side that is padded is cut to multiples of ROUND_TO."""
    first, last = int(columns.min()), _round_up(int(columns.max()) + 1)
    return (first // ROUND_TO * ROUND_TO if left_padded else 0), last


def _round_up(length: int) -> int:
    return -(-length // ROUND_TO) * ROUND_TO


def _filled(shape: tuple[int, int], rest: int | bool, cells: torch.Tensor, values: torch.Tensor | bool) -> torch.Tensor:
    filled = torch.full(shape, rest)
    filled.flatten()[cells] = values
    return filled
