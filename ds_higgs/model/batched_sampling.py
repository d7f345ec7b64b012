"""Draws the next column of several speeches at once: for each the codes that boson's own sampler draws for it alone."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ds_higgs.model.generation import Sampling
from ds_higgs.model.server_sampling import NOT_ENDING, allowed_codes

_NOTHING = -1  # stands before speech that is shorter than another row's


class Streams:
    """The speech of every row, as boson's loop keeps each; all end at the same column.

    Args:
        heard: of each row, [codebooks, columns] int64 of its prompt's own speech; what is spoken comes after it.
        seeds: of each row's random numbers.
        room: columns that can be drawn.
    """

    def __init__(
        self, config: Any, sampling: Sampling, heard: Sequence[torch.Tensor], *, seeds: Sequence[int], room: int
    ):
        self._config = config
        self._sampling = sampling
        self._greedy = sampling.temperature == 0
        self._warpers = LogitsProcessorList() if self._greedy else build_warpers(sampling)
        device, rows = heard[0].device, len(heard)
        self._random = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self._codebooks = torch.arange(config.audio_num_codebooks, device=device)
        self._start = max(codes.shape[1] for codes in heard)
        self._end = self._start + 1
        shape = (rows, config.audio_num_codebooks, self._end + room)
        self._columns = torch.full(shape, _NOTHING, dtype=torch.long, device=device)
        for row, codes in enumerate(heard):
            self._columns[row, :, self._start - codes.shape[1] : self._start] = codes
        self._columns[:, :, self._start] = config.audio_stream_bos_id
        self._lengths = torch.full((rows,), self._end, device=device)
        self._delay = 0  # the last codebook that has begun, in every row
        # [rows]: codebooks that have not ended
        self._remaining = torch.full((rows,), NOT_ENDING, device=device)
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._going = list(range(rows))  # the rows that have not ended

    @property
    def last(self) -> torch.Tensor:
        """The newest column of every row: [codebooks, rows]."""
        return self._columns[:, :, self._end - 1].T

    @property
    def ended(self) -> list[bool]:
        """The rows that have ended by themselves."""
        return self._ended.tolist()

    @property
    def all_ended(self) -> bool:
        """Whether there is nothing left to draw."""
        return not self._going

    def spoken(self) -> list[torch.Tensor]:
        """Of every row, [codebooks, columns] from stream BOS to its end."""
        pairs = zip(self._columns, self._lengths.tolist(), strict=True)
        return [columns[:, self._start : length] for columns, length in pairs]

    def draw(self, logits: torch.Tensor) -> None:
        """Add a column to every row that has not ended, from logits [rows, codebooks, codes] fp32."""
        if self._sampling.as_served:
            logits = logits.masked_fill(~self._allowed(logits.shape[2]), float("-inf"))
        goes_on = ~self._ended
        going = torch.tensor(self._going, device=logits.device)
        codes = self._columns.new_zeros(logits.shape[:2])
        codes[going] = self._choose(logits[going], going)
        if self._config.use_delay_pattern:
            codes = self._delayed(codes)
            self._going = (~self._ended).nonzero().flatten().tolist()
        self._columns[:, :, self._end] = codes
        self._end += 1
        self._lengths = torch.where(goes_on, self._end, self._lengths)

    def _allowed(self, codebook_size: int) -> torch.Tensor:
        config = self._config
        bos, eos = config.audio_stream_bos_id, config.audio_stream_eos_id
        return allowed_codes(self._codebooks, codebook_size, self._delay, self._remaining, bos=bos, eos=eos)

    def _choose(self, logits: torch.Tensor, going: torch.Tensor) -> torch.Tensor:
        """The likeliest codes of the rows that go on, or drawn ones, and others for those that were there too often.

        logits: [rows that go on, codebooks, codes] -> [rows that go on, codebooks].
        """
        scores = self._warpers(None, logits.flatten(0, 1))
        if self._greedy:
            return scores.argmax(dim=-1).view(logits.shape[:2])
        shares = [len(self._codebooks)] * len(logits)
        codes = self._draw_from(scores.softmax(dim=-1), shares).view(logits.shape[:2])
        if self._sampling.ras_window is None:
            return codes
        recent = self._columns[going, :, max(0, self._end - self._sampling.ras_window) : self._end]
        repeated = (recent == codes.unsqueeze(-1)).sum(dim=-1) >= self._sampling.ras_max_repeats
        shares = repeated.sum(dim=1).tolist()
        if any(shares):
            codes[repeated] = self._draw_from(logits[repeated].softmax(dim=-1), shares)
        return codes

    def _draw_from(self, probabilities: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
        """One code of each distribution, [draws, codes] -> [draws]; `shares`: how many each row has that goes on.

        Each row's random numbers make of its distributions what torch.multinomial does, to the bit; that takes one
        generator alone, so that it would be called row by row.
        """
        noise = torch.empty_like(probabilities)
        for part, row in zip(noise.split(list(shares)), self._going, strict=True):
            if len(part):
                part.exponential_(generator=self._random[row])
        if not torch.isfinite(probabilities.sum()):
            raise RuntimeError("the model's logits are not finite: there is no code to draw")
        return (probabilities / noise).argmax(dim=-1)

    def _delayed(self, codes: torch.Tensor) -> torch.Tensor:
        """What the delay makes of codes drawn: BOS before a codebook's turn, EOS in all before the first that ends."""
        config, place = self._config, self._codebooks
        eos = config.audio_stream_eos_id
        codes = codes.masked_fill(place > self._delay, config.audio_stream_bos_id)
        self._delay = min(self._delay + 1, len(place) - 1)
        ending = self._remaining != NOT_ENDING
        begins = ~ending & (codes == eos).any(dim=1)
        first = (codes == eos).int().argmax(dim=1)
        num_ended = torch.where(ending, len(place) - self._remaining, torch.where(begins, first, 0))
        self._remaining = torch.where(
            ending, self._remaining - 1, torch.where(begins, len(place) - first - 1, NOT_ENDING)
        )
        self._ended |= (ending | begins) & (self._remaining <= 0)
        return codes.masked_fill(place < num_ended.unsqueeze(1), eos)


def build_warpers(sampling: Sampling) -> LogitsProcessorList:
    """What makes probabilities of logits, as transformers' `generate` puts it together for these settings."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers
