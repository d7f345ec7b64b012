"""The samples of a manifest as tokens and cached codes; no audio is held, and none is read while training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from torch.utils.data import Dataset

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.data.audio import decode
from ds_higgs.data.cache import ClipReader
from ds_higgs.data.conditions import NOTHING, Dropped, DropRates, PromptParts, draw_dropped
from ds_higgs.data.manifest import sample_id
from ds_higgs.data.prepared import PreparedSet
from ds_higgs.data.problems import Problem
from ds_higgs.data.redrawing import KEEPS_ITS_OWN, DrawnReferences, References
from ds_higgs.data.sampling import draw_half
from ds_higgs.layout import WHISPER_RATE, AudioLayout


class HiggsDataset(Dataset):
    """dataset[i] is boson's ChatMLDatasetSample, made of tokens and cached codes.

    lengths: [num_samples] int32, positions that a sample takes in the model, placeholders expanded (at most, where it
        is there in two forms, or with other references).
    redraws: whether samples hear another reference in every epoch.
    rejected: what is wrong with the manifest's samples that were left out.
    filler_index: the shortest sample with audio to learn (the shortest one, where none has).

    Args:
        mixed: whether an epoch has each sample in one of two forms: its own, or the one that servers send.
    """

    def __init__(
        self, manifest: Path, prepared: PreparedSet, codes: ClipReader, *, layout: AudioLayout, mixed: bool = False
    ):
        self.manifest = manifest
        self.rejected: tuple[Problem, ...] = tuple(prepared.marker.problems)
        self.layout = layout
        self._prepared = prepared
        self._samples = prepared.samples
        self._codes = codes
        self._drop_rates = DropRates()
        self._parts: PromptParts | None = None
        self._mixed = mixed
        self._references: tuple[References, ...] = ()  # in each form
        self.lengths = self._samples.column("length")
        self.filler_index = self._find_filler()
        if mixed:
            self.lengths = np.maximum(self.lengths, self._samples.column("served_length"))

    def leave_out(self, rates: DropRates, parts: PromptParts) -> None:
        """Leave parts of the prompt out of some samples, drawn anew every epoch; lengths stay those of whole ones."""
        self._drop_rates, self._parts = rates, parts

    def redraw_references(self, parts: PromptParts, max_tokens: int) -> None:
        """Let samples hear another clip of their speaker in every epoch, as far as they then take `max_tokens`."""
        self._references = tuple(
            References(
                self._samples,
                self._prepared.places.frames,
                self._samples.column("served_length" if served else "length"),
                parts=parts,
                max_tokens=max_tokens,
                served=served,
            )
            for served in ((False, True) if self._mixed else (False,))
        )
        self.lengths = np.maximum.reduce([self.lengths, *(form.longest for form in self._references)])
        self.filler_index = self._find_filler()

    @property
    def redraws(self) -> bool:
        return bool(self._references)

    @property
    def references(self) -> References:
        """What `redraw_references` found, in the samples' own form."""
        return self._references[0]

    def in_epoch(self, epoch: int, *, seed: int) -> "HiggsDataset | EpochSamples":
        """The samples as this epoch has them: form, parts of the prompt and references, drawn from `seed`."""
        if not self._mixed and self._parts is None and not self.redraws:
            return self
        differ = self._samples.column("forms_differ").astype(np.bool_) & self._mixed
        served = draw_half(differ, seed=seed, epoch=epoch)
        dropped = draw_dropped(self._drop_rates, len(self), seed=seed, epoch=epoch)
        return EpochSamples(self, served, dropped, self._draw_references(served, seed=seed, epoch=epoch))

    def _draw_references(self, served: np.ndarray, *, seed: int, epoch: int) -> DrawnReferences:
        """Of each sample in the form in which it is."""
        if not self.redraws:
            return DrawnReferences(np.full(len(self), KEEPS_ITS_OWN, dtype=np.int32), self.lengths)
        first, *others = (form.draw(seed=seed, epoch=epoch) for form in self._references)
        for other in others:
            first = DrawnReferences(*(np.where(served, *pair) for pair in zip(other, first, strict=True)))
        return first

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> ChatMLDatasetSample:
        return self.read(index)

    def read(
        self, index: int, dropped: Dropped = NOTHING, *, served: bool = False, reference: int = KEEPS_ITS_OWN
    ) -> ChatMLDatasetSample:
        """A sample without what is `dropped`, in its own form or in the one that servers send.

        Args:
            reference: the clip that it hears, by its number among the clips of all samples.
        """
        tokens, is_label = self._prepared.tokens(index, served=served)
        places = list(range(self._samples.first_use(index), self._samples.first_use(index + 1)))
        if reference != KEEPS_ITS_OWN:
            exchange = self._references[served].exchange(index, reference)
            said, _ = self._prepared.tokens(exchange.row, served=served)
            tokens, is_label = exchange.apply(tokens, is_label, said[exchange.words])
            places[exchange.place] = exchange.use
        input_ids, supervised = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(is_label)
        if self._parts is not None and any(dropped):
            kept = torch.from_numpy(self._parts.keep(input_ids.numpy(), supervised.numpy(), dropped))
            audible = kept[self._is_audio(input_ids)].tolist()
            places = [place for place, stays in zip(places, audible, strict=True) if stays]
            input_ids, supervised = input_ids[kept], supervised[kept]
        where = self._prepared.places
        codes = [self._codes.read(int(where.file[place]), int(where.row[place])) for place in places]
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
        return sample_id(self.manifest, self._samples.value("number", index))

    def count_targets(self, index: int) -> tuple[int, int]:
        """Supervised text tokens of a sample, and code frames to learn."""
        return self._samples.value("text_targets", index), self._samples.value("target_frames", index)

    def count_target_frames(self) -> np.ndarray:
        """[num_samples] int32, code frames to learn of every sample."""
        return self._samples.column("target_frames")

    def _is_audio(self, input_ids: torch.Tensor) -> torch.Tensor:
        return (input_ids == self.layout.audio_in_token) | (input_ids == self.layout.audio_out_token)

    def _reference_audio(self, places: Sequence[int], input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms of the user's audio at 16 kHz and where each begins; empty without Whisper features."""
        if not self.layout.whisper:
            return torch.zeros(0), torch.zeros(0, dtype=torch.long)
        placeholders = input_ids[self._is_audio(input_ids)]
        waveforms = [
            torch.from_numpy(decode(clip.source(self.manifest), clip.segment, sampling_rate=WHISPER_RATE))
            for clip, token in zip((self._samples.clip(place) for place in places), placeholders, strict=True)
            if token == self.layout.audio_in_token
        ]
        starts = np.cumsum([0, *(len(waveform) for waveform in waveforms)])[:-1]
        return torch.cat([torch.zeros(0), *waveforms]), torch.from_numpy(starts.astype(np.int64))

    def _find_filler(self) -> int:
        with_audio = np.flatnonzero(self.count_target_frames() > 0)
        candidates = with_audio if len(with_audio) else np.arange(len(self))
        return int(candidates[np.argmin(self.lengths[candidates])])


class EpochSamples(Dataset):
    """The samples of one epoch, some as servers send them, without parts of their prompt or with other references.

    lengths: [num_samples] int32, positions that a sample takes, whole.
    """

    def __init__(self, dataset: HiggsDataset, is_served: np.ndarray, dropped: np.ndarray, references: DrawnReferences):
        """is_served: [num_samples] bool, which are in the form of servers; dropped: see `conditions.draw_dropped`."""
        self.filler_index = dataset.filler_index
        self.is_served = is_served
        self.dropped = dropped
        self.lengths = references.lengths
        self._references = references.uses
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self.is_served)

    def __getitem__(self, index: int) -> ChatMLDatasetSample:
        dropped = Dropped(*self.dropped[index].tolist())
        reference, served = int(self._references[index]), bool(self.is_served[index])
        return self._dataset.read(index, dropped, served=served, reference=reference)

    def sample_id(self, index: int) -> str:
        return self._dataset.sample_id(index)
