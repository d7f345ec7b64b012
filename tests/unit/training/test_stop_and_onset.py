"""What is measured of ends and beginnings, against loops that are written from the definitions."""

from itertools import pairwise

import pytest
import torch

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.losses import build_targets
from ds_higgs.model.loading import load_tokenizer, read_model_config
from ds_higgs.training.step_module import TargetScores
from ds_higgs.training.stop_and_onset import Landmarks, known_averages, measure, summarise
from tests.support.batches import Sample, make_batch

ONSET = 4  # frames
WEIGHTS = tuple(number / 36 for number in range(1, 9))


@pytest.fixture(scope="module")
def batch(tiny_base):
    samples = [Sample("x y", (2, 3), (4, 1, 9)), Sample("z", (), (7,))]
    return make_batch(samples, load_tokenizer(tiny_base), read_model_config(tiny_base))


@pytest.fixture(scope="module")
def landmarks(tiny_base):
    tokenizer, config = load_tokenizer(tiny_base), read_model_config(tiny_base)
    ids = tokenizer.convert_tokens_to_ids
    return Landmarks(
        stream_eos=config.audio_stream_eos_id,
        onset_frames=ONSET,
        delay=1,
        audio_start=ids("<|audio_out_bos|>"),
        ends=(ids("<|audio_eos|>"), ids("<|eot_id|>")),
    )


@pytest.fixture(scope="module")
def targets(tiny_base, batch):
    config = read_model_config(tiny_base)
    return build_targets(batch, placeholder_ids=(config.audio_in_token_idx, config.audio_out_token_idx))


@pytest.fixture(scope="module")
def scores(targets):
    generator = torch.Generator().manual_seed(3)
    rows = len(targets.audio_frames)
    labelled = targets.audio_labels.t() != IGNORE_INDEX
    return TargetScores(
        text=torch.rand(len(targets.text_labels), generator=generator),
        audio=torch.rand((rows, 8), generator=generator) * labelled,
        end=torch.rand(rows, generator=generator),
        ends=torch.rand(rows, generator=generator) < 0.3,
    )


def found(batch, targets, scores, landmarks):
    return summarise(*measure(batch, targets, scores, landmarks).tolist(), WEIGHTS)


def mean(values):
    return sum(values) / len(values)


def test_ends_and_kinds_of_text(batch, targets, scores, landmarks):
    values = found(batch, targets, scores, landmarks)
    assert values.num_ends == 4
    first = targets.audio_labels[0].tolist()
    at_end = [float(p) for p, code in zip(scores.end, first, strict=True) if code == landmarks.stream_eos]
    before = [bool(e) for e, code in zip(scores.ends, first, strict=True) if code not in (landmarks.stream_eos, -100)]
    assert values.eos_probability == pytest.approx(mean(at_end))
    assert values.false_eos_rate == pytest.approx(mean(before))
    kinds = {"words": [], "start": [], "end": []}
    for loss, token in zip(scores.text.tolist(), targets.text_labels.tolist(), strict=True):
        kinds["start" if token == landmarks.audio_start else "end" if token in landmarks.ends else "words"].append(loss)
    assert values.words_loss == pytest.approx(mean(kinds["words"]))
    assert values.audio_start_loss == pytest.approx(mean(kinds["start"]))
    assert values.end_tokens_loss == pytest.approx(mean(kinds["end"]))


def test_onset_and_rest(batch, targets, scores, landmarks):
    """Frame by frame of every segment, the delay of each codebook taken off."""
    values = found(batch, targets, scores, landmarks)
    starts = [*batch.model_inputs["audio_out_ids_start"].tolist(), batch.labels.audio.shape[1]]
    row_of = {int(frame): row for row, frame in enumerate(targets.audio_frames)}
    onset, later = ([[] for _ in range(8)] for _ in range(2))
    for start, stop in pairwise(starts):
        for codebook in range(8):
            for frame, column in enumerate(range(start + 1 + codebook, stop)):
                if batch.labels.audio[codebook, column] != IGNORE_INDEX:
                    loss = float(scores.audio[row_of[column - 1], codebook])
                    (onset if frame < ONSET else later)[codebook].append(loss)
    assert sum(map(len, onset)) == 8 * (4 + 2 + 4 + 4)
    for value, part in ((values.onset_audio_loss, onset), (values.later_audio_loss, later)):
        assert value == pytest.approx(sum(weight * mean(losses) for weight, losses in zip(WEIGHTS, part, strict=True)))


def test_without_audio_there_is_nothing_to_average(tiny_base, landmarks):
    config = read_model_config(tiny_base)
    batch = make_batch([Sample("only text", (), ())], load_tokenizer(tiny_base), config)
    targets = build_targets(batch, placeholder_ids=(config.audio_in_token_idx, config.audio_out_token_idx))
    none = torch.zeros(0)
    scores = TargetScores(torch.ones(len(targets.text_labels)), torch.zeros(0, 8), none, none.bool())
    values = found(batch, targets, scores, landmarks)
    assert (values.num_ends, values.eos_probability, values.onset_audio_loss) == (0, None, None)
    assert values.words_loss == 1
    assert set(known_averages(vars(values))) == {"words_loss", "end_tokens_loss"}
