"""Teacher-forced accuracy: position t is compared with the code at t + 1, masked labels do not count."""

import pytest
import torch

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.speech.accuracy import count_correct
from ds_higgs.speech.in_training import summarise_rows

X = IGNORE_INDEX


def test_known_predictions():
    labels = torch.tensor([[X, 1, 2, 3, X], [X, X, 4, 4, 4]])  # [2 codebooks, 5 frames]
    predicted = torch.tensor([[1, 0], [2, 4], [0, 4], [3, 0], [1, 4]])  # [5 frames, 2 codebooks]
    accuracy = count_correct(torch.nn.functional.one_hot(predicted, 6).float(), labels)
    assert accuracy.correct.tolist() == [2, 2]
    assert accuracy.total.tolist() == [3, 3]
    assert accuracy.per_codebook() == pytest.approx([2 / 3, 2 / 3])
    assert accuracy.overall() == pytest.approx(2 / 3)


def test_a_copy_of_the_labels_without_the_shift_is_wrong():
    labels = torch.tensor([[X, 1, 2, 3, 4]])
    unshifted = torch.nn.functional.one_hot(torch.tensor([[0], [1], [2], [3], [4]]), 6).float()
    assert count_correct(unshifted, labels).overall() == 0.0


def test_without_labels_nothing_is_right():
    accuracy = count_correct(torch.zeros(3, 2, 6), torch.full((2, 3), X))
    assert accuracy.per_codebook() == [0.0, 0.0]
    assert accuracy.overall() == 0.0


def test_rows_are_averaged_and_stops_counted():
    row = {"code_accuracy": 0.5, "duration_ratio": 1.0, "silence_share": 0.0, "mel_cepstral_distance": None}
    rows = [{**row, "stopped_by": "eos"}, {**row, "code_accuracy": 0.0, "stopped_by": "length"}]
    assert summarise_rows(rows) == {
        "code_accuracy": 0.25,
        "duration_ratio": 1.0,
        "silence_share": 0.0,
        "stop_rate": 0.5,
    }
