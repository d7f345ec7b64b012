"""The samples of a manifest as tokens and cached codes; no audio is held, and none is read while training."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from torch.utils.data import Dataset

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.data.audio import decode
from ds_higgs.data.cache import CachedClip, CodeCache, read_codes
from ds_higgs.data.clips import Clip
from ds_higgs.data.conditions import NOTHING, Dropped, DropRates, PromptParts, draw_dropped
from ds_higgs.data.manifest import sample_id
from ds_higgs.data.problems import Problem
from ds_higgs.data.sampling import draw_half
from ds_higgs.layout import WHISPER_RATE, AudioLayout


@dataclass(frozen=True)
class ClipTable:
    """The distinct clips of a data set, as arrays: they are shared with worker processes and cost 32 bytes a clip.

    shards: file names; the arrays are [num_clips]: shard number, byte offset, frames, checksum.
    """

    shards: list[str]
    shard: np.ndarray
    offset: np.ndarray
    frames: np.ndarray
    checksum: np.ndarray

    def row(self, index: int, num_codebooks: int) -> CachedClip:
        return CachedClip(
            shard=self.shards[self.shard[index]],
            offset=int(self.offset[index]),
            num_codebooks=num_codebooks,
            num_frames=int(self.frames[index]),
            checksum=int(self.checksum[index]),
            seconds=0.0,
        )


class HiggsDataset(Dataset):
    """dataset[i] is boson's ChatMLDatasetSample, made of tokens and cached codes.

    lengths: [num_samples] int32, positions that a sample takes in the model, placeholders expanded (at most, where it
        is there in two forms).
    rejected: what is wrong with the manifest's samples that were left out.
    filler_index: the shortest sample with audio to learn (the shortest one, where none has).

    Args:
        arrays: as `analysis.pack_samples` makes them.
        clips: for each sample, one per audio placeholder; all of them in `cache`.
    """

    def __init__(
        self,
        manifest: Path,
        arrays: dict[str, np.ndarray],
        clips: Sequence[Sequence[Clip]],
        *,
        cache: CodeCache,
        layout: AudioLayout,
        rejected: Sequence[Problem] = (),
    ):
        self.manifest = manifest
        self.rejected = tuple(rejected)
        self.layout = layout
        self._folder = cache.folder
        self._numbers = arrays["numbers"]
        self._tokens = arrays["tokens"]
        self._supervised = arrays["supervised"]
        self._ends = np.cumsum(arrays["token_counts"])
        keys = [clip.key for sample in clips for clip in sample]
        self._clip_ends = np.cumsum([len(sample) for sample in clips], dtype=np.int64)
        self._clips, self._clip_of = _build_clip_table(keys, cache)
        self._sources = [clip for sample in clips for clip in sample] if layout.whisper else []
        self._served: HiggsDataset | None = None
        self._drop_rates = DropRates()
        self._parts: PromptParts | None = None
        self._differs = np.zeros(len(self), dtype=np.bool_)
        self.lengths = self._compute_lengths(_seconds_of(clips))
        self.filler_index = self._find_filler()

    def mix_with(self, served: dict[str, np.ndarray], clips: Sequence[Sequence[Clip]]) -> None:
        """Give every sample a second form, the one that servers send; an epoch has each in one of them.

        Args:
            served: the samples in that form, as `analysis.pack_samples` makes them; clips: as they were given before.
        """
        other = copy(self)
        other._tokens, other._supervised = served["tokens"], served["supervised"]
        other._ends = np.cumsum(served["token_counts"])
        other.lengths = other._compute_lengths(_seconds_of(clips))
        self.lengths = np.maximum(self.lengths, other.lengths)
        self._served = other
        self._differs = np.asarray([not self._same_tokens(other, index) for index in range(len(self))])

    def leave_out(self, rates: DropRates, parts: PromptParts) -> None:
        """Leave parts of the prompt out of some samples, drawn anew every epoch; lengths stay those of whole ones."""
        self._drop_rates, self._parts = rates, parts

    def in_epoch(self, epoch: int, *, seed: int) -> "HiggsDataset | EpochSamples":
        """The samples as this epoch has them: in which form, and with which parts of the prompt, drawn from `seed`."""
        if self._served is None and self._parts is None:
            return self
        dropped = draw_dropped(self._drop_rates, len(self), seed=seed, epoch=epoch)
        return EpochSamples(self, self._served, draw_half(self._differs, seed=seed, epoch=epoch), dropped)

    def _same_tokens(self, other: "HiggsDataset", index: int) -> bool:
        own, others = _span(self._ends, index), _span(other._ends, index)
        return np.array_equal(self._tokens[own], other._tokens[others])

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> ChatMLDatasetSample:
        return self.read(index)

    def read(self, index: int, dropped: Dropped = NOTHING) -> ChatMLDatasetSample:
        """A sample without what is `dropped`."""
        input_ids, supervised = self._tokens_of(index)
        places = list(self._clips_of(index))
        if self._parts is not None and any(dropped):
            kept = torch.from_numpy(self._parts.keep(input_ids.numpy(), supervised.numpy(), dropped))
            audible = kept[self._is_audio(input_ids)].tolist()
            places = [place for place, stays in zip(places, audible, strict=True) if stays]
            input_ids, supervised = input_ids[kept], supervised[kept]
        codes = [self._read(place) for place in places]
        starts = np.cumsum([0, *(clip.shape[1] for clip in codes)])[:-1]
        waveforms, waveform_starts = self._reference_audio(places, input_ids)
        return ChatMLDatasetSample(
            input_ids=input_ids,
            label_ids=torch.where(supervised, input_ids, IGNORE_INDEX),
            audio_ids_concat=torch.cat([torch.zeros((self.layout.num_codebooks, 0), dtype=torch.long), *codes], dim=1),
            audio_ids_start=torch.from_numpy(starts.astype(np.int64)),
            audio_waveforms_concat=waveforms,
            audio_waveforms_start=waveform_starts,
            audio_sample_rate=torch.full((len(waveform_starts),), WHISPER_RATE, dtype=torch.float32),
            audio_speaker_indices=torch.full((len(codes),), -1, dtype=torch.long),
        )

    def sample_id(self, index: int) -> str:
        """The sample's name in messages: "train.json:3"."""
        return sample_id(self.manifest, int(self._numbers[index]))

    def count_targets(self, index: int) -> tuple[int, int]:
        """Supervised text tokens of a sample, and code frames to learn."""
        input_ids, supervised = self._tokens_of(index)
        is_audio_out = input_ids == self.layout.audio_out_token
        is_audio = is_audio_out | (input_ids == self.layout.audio_in_token)
        learned = (is_audio_out & supervised)[is_audio].numpy()
        frames = self._clips.frames[self._clip_of[self._clips_of(index)]]
        return int((supervised & ~is_audio).sum()), int(frames[learned].sum())

    def _tokens_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        span = _span(self._ends, index)
        tokens = torch.from_numpy(self._tokens[span].astype(np.int64))
        return tokens, torch.from_numpy(self._supervised[span].copy())

    def _clips_of(self, index: int) -> range:
        span = _span(self._clip_ends, index)
        return range(span.start, span.stop)

    def _read(self, place: int) -> torch.Tensor:
        return read_codes(self._folder, self._clips.row(self._clip_of[place], self.layout.num_codebooks))

    def _is_audio(self, input_ids: torch.Tensor) -> torch.Tensor:
        return (input_ids == self.layout.audio_in_token) | (input_ids == self.layout.audio_out_token)

    def _reference_audio(self, places: Sequence[int], input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms of the user's audio at 16 kHz and where each begins; empty without Whisper features."""
        if not self.layout.whisper:
            return torch.zeros(0), torch.zeros(0, dtype=torch.long)
        placeholders = input_ids[self._is_audio(input_ids)]
        waveforms = [
            torch.from_numpy(decode(clip.source(self.manifest), clip.segment, sampling_rate=WHISPER_RATE))
            for clip, token in zip((self._sources[place] for place in places), placeholders, strict=True)
            if token == self.layout.audio_in_token
        ]
        starts = np.cumsum([0, *(len(waveform) for waveform in waveforms)])[:-1]
        return torch.cat([torch.zeros(0), *waveforms]), torch.from_numpy(starts.astype(np.int64))

    def _compute_lengths(self, seconds: np.ndarray) -> np.ndarray:
        frames = self._clips.frames[self._clip_of].astype(np.int64)
        positions = np.cumsum(self.layout.count_positions(self._tokens, frames, seconds))
        return np.diff(positions[self._ends - 1], prepend=0).astype(np.int32)

    def _find_filler(self) -> int:
        target = self._supervised & (self._tokens == self.layout.audio_out_token)
        samples = np.unique(np.searchsorted(self._ends, np.flatnonzero(target), side="right"))
        candidates = samples if len(samples) else np.arange(len(self))
        return int(candidates[np.argmin(self.lengths[candidates])])


class EpochSamples(Dataset):
    """The samples of one epoch, some of them in the form that servers send, some without parts of their prompt."""

    def __init__(
        self, as_is: HiggsDataset, served: HiggsDataset | None, is_served: np.ndarray, dropped: np.ndarray | None = None
    ):
        """is_served: [num_samples] bool, where there are two forms; dropped: see `conditions.draw_dropped`."""
        self.filler_index = as_is.filler_index
        self._forms = (as_is, served or as_is)
        self.is_served = is_served
        self.dropped = np.zeros((len(is_served), 3), dtype=np.bool_) if dropped is None else dropped

    def __len__(self) -> int:
        return len(self.is_served)

    def __getitem__(self, index: int) -> ChatMLDatasetSample:
        return self._forms[int(self.is_served[index])].read(index, Dropped(*self.dropped[index].tolist()))

    def sample_id(self, index: int) -> str:
        return self._forms[0].sample_id(index)


def _seconds_of(clips: Sequence[Sequence[Clip]]) -> np.ndarray:
    return np.asarray([clip.seconds for sample in clips for clip in sample])


def _build_clip_table(keys: Sequence[str], cache: CodeCache) -> tuple[ClipTable, np.ndarray]:
    """The distinct clips, and for each of `keys` its row."""
    rows: dict[str, int] = {}
    clip_of = np.asarray([rows.setdefault(key, len(rows)) for key in keys], dtype=np.int32)
    cached = [cache[key] for key in rows]
    shards: dict[str, int] = {}
    table = ClipTable(
        shard=np.asarray([shards.setdefault(clip.shard, len(shards)) for clip in cached], dtype=np.int32),
        offset=np.asarray([clip.offset for clip in cached], dtype=np.int64),
        frames=np.asarray([clip.num_frames for clip in cached], dtype=np.int32),
        checksum=np.asarray([clip.checksum for clip in cached], dtype=np.uint32),
        shards=list(shards),
    )
    return table, clip_of


def _span(ends: np.ndarray, index: int) -> slice:
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))
