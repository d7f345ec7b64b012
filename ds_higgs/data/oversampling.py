"""Short utterances more than once in an epoch: they teach how to begin and where to end, long ones outweigh them."""

import numpy as np
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample

from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.order import Samples, SampleSource


def oversample_short(dataset: HiggsDataset, *, frames: int, times: int) -> SampleSource:
    """The data set, each sample with audio to learn of fewer than `frames` code frames `times` in an epoch."""
    if times == 1:
        return dataset
    learned = dataset.count_target_frames()
    short = np.flatnonzero((learned > 0) & (learned < frames))
    return Repeated(dataset, np.concatenate([np.arange(len(dataset)), np.tile(short, times - 1)]))


class Repeated:
    """A data set with some of its samples more than once.

    samples: for each place the sample there, a number of `dataset`.
    """

    def __init__(self, dataset: SampleSource, samples: np.ndarray):
        self.samples = samples
        self.lengths = dataset.lengths[samples]
        self.redraws = dataset.redraws
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self.samples)

    def in_epoch(self, epoch: int, *, seed: int) -> Samples:
        return _RepeatedSamples(self._dataset.in_epoch(epoch, seed=seed), self.samples)


class _RepeatedSamples:
    """The samples of one epoch; a sample is in the same form wherever it stands."""

    def __init__(self, samples: Samples, places: np.ndarray):
        self.filler_index = samples.filler_index  # the data set itself comes first
        self.lengths = samples.lengths[places]
        self._samples = samples
        self._places = places

    def __getitem__(self, index: int) -> ChatMLDatasetSample:
        return self._samples[int(self._places[index])]

    def sample_id(self, index: int) -> str:
        return self._samples.sample_id(int(self._places[index]))
