"""Short utterances come as often as asked for, all others once, and a resumed epoch goes on where it was."""

from collections import Counter

from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.oversampling import oversample_short

TIMES = 3


def names_of(loader: StepLoader) -> list[str]:
    return [name for step in loader for batch in step for name in batch.sample_ids]


def make_loader(dataset, layout, frames: int) -> StepLoader:
    source = oversample_short(dataset, frames=frames, times=TIMES)
    return StepLoader(EpochOrder(source, batch_size=2, seed=1), BatchCollator(layout))


def test_short_speech_comes_as_often_as_asked_for(mixed_dataset, make_rules):
    layout = make_rules().layout
    learned = [mixed_dataset.count_targets(index)[1] for index in range(len(mixed_dataset))]
    limit = sorted(learned)[len(learned) // 2]
    expected = Counter(
        {mixed_dataset.sample_id(index): TIMES if 0 < frames < limit else 1 for index, frames in enumerate(learned)}
    )
    assert TIMES in expected.values()
    assert any(frames == 0 for frames in learned)
    loader = make_loader(mixed_dataset, layout, limit)
    whole = names_of(loader)
    assert Counter(whole) == expected
    assert Counter(names_of(loader)) == expected  # the next epoch

    first = make_loader(mixed_dataset, layout, limit)
    steps = iter(first)
    done = [name for _ in range(3) for batch in next(steps) for name in batch.sample_ids]
    resumed = make_loader(mixed_dataset, layout, limit)
    resumed.load_state_dict(first.state_dict())
    assert done + names_of(resumed) == whole


def test_once_is_the_data_set_itself(mixed_dataset):
    assert oversample_short(mixed_dataset, frames=10**6, times=1) is mixed_dataset
