"""What a training can tell of its data's ends as it starts: a look at some recordings, one collated sample."""

import logging
import os

import numpy as np

from ds_higgs.data.audio import read_frames
from ds_higgs.data.build import Preparation
from ds_higgs.data.clips import Clip
from ds_higgs.data.code_names import holds_codes
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.containers.opening import file_on_disk
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.review.sound import measure_sound
from ds_higgs.data.review.sound_checks import is_cut
from ds_higgs.layout import AudioLayout

logger = logging.getLogger("ds_higgs")

LOOKED_AT = 32  # recordings: half a second of reading
TOLERATED = 0.1  # share of them that may end in speech before it is told


def warn_of_cut_recordings(preparation: Preparation, layout: AudioLayout) -> None:
    """Say so where many recordings to learn end in the middle of speech, by a few spread over the manifest."""
    targets = _some_targets(preparation, layout)
    cut = [number for number, clip in targets if is_cut(measure_sound(*_read(clip, preparation)))]
    if len(cut) > TOLERATED * len(targets):
        logger.warning(
            "%s: %d of %d recordings looked at are cut off in speech (sample %d first): the model learns to stop "
            "anywhere; `ds-higgs validate` names them all",
            preparation.manifest,
            len(cut),
            len(targets),
            cut[0],
        )


def _some_targets(preparation: Preparation, layout: AudioLayout) -> list[tuple[int, Clip]]:
    """Clips to learn, each with its sample's number."""
    samples, good = preparation.samples, preparation.good_samples()
    chosen = np.unique(np.linspace(0, len(good) - 1, min(LOOKED_AT, len(good))).round().astype(int))
    return [
        (samples.value("number", row), clip)
        for row in good[chosen].tolist()
        for clip, learned in zip(samples.clips(row), samples.audio_targets(row, layout), strict=True)
        if learned
        and not holds_codes(clip.path)
        and (not clip.path or os.path.exists(file_on_disk(clip.path)))  # codes may have come without their audio
    ]


def _read(clip: Clip, preparation: Preparation) -> tuple[np.ndarray, int]:
    return read_frames(clip.source(preparation.manifest), clip.segment)


def warn_of_missing_ends(dataset: HiggsDataset, collator: BatchCollator) -> None:
    """Say so where speech is learned without its end: what was trained on it would never stop."""
    index = dataset.filler_index
    labels = collator([dataset[index]], [dataset.sample_id(index)]).labels.audio
    if labels.shape[1] and not (labels[0] == collator.layout.stream_eos).any():
        logger.warning(
            "%s: no end token in its speech (stream EOS %d in the first codebook): what is trained on it will not stop",
            dataset.sample_id(index),
            collator.layout.stream_eos,
        )
