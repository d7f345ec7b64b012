"""Two preparations of one manifest at once, with different rules: each gets its own samples.

DS_HIGGS_PREPARATION_ROUNDS sets the number of rounds of the slow form.
"""

import multiprocessing
import os

import pytest
import torch

from ds_higgs.data.build import Preparation, build_dataset
from ds_higgs.data.ranks import RankChannel
from tests.support.patience import HANG_S

ROUNDS = int(os.environ.get("DS_HIGGS_PREPARATION_ROUNDS", "100"))
WRONG = 3  # exit status of a process whose samples are another's


def contents(dataset):
    """Everything that training would see of it."""
    samples = [dataset[index] for index in range(len(dataset))]
    ids = [dataset.sample_id(index) for index in range(len(dataset))]
    return ids, [(sample.input_ids, sample.label_ids, sample.audio_ids_concat) for sample in samples]


def equal(first, second):
    same_samples = first[0] == second[0]
    return same_samples and all(
        torch.equal(one, other)
        for row, other_row in zip(first[1], second[1], strict=True)
        for one, other in zip(row, other_row, strict=True)
    )


def prepare_and_compare(start, expected, manifest, rules, cache_dir):
    torch.set_num_threads(1)
    start.wait(timeout=HANG_S)
    found = build_dataset(manifest, rules=rules, cache_dir=cache_dir, on_bad_sample="skip")
    os._exit(0 if equal(contents(found), expected) else WRONG)


def test_a_preparation_in_the_midst_of_another_changes_nothing(mixed_manifest, mixed_dataset, make_rules, tmp_path):
    """The other one runs from start to end at each place where the first one's ranks would meet."""
    other = Preparation(mixed_manifest, rules=make_rules(reference_turn="assistant"), cache_dir=tmp_path)
    meetings = []

    def gather(content):
        other.run(on_bad_sample="error", devices=["cpu"])
        meetings.append(content)
        return [content]

    preparation = Preparation(mixed_manifest, rules=make_rules(), cache_dir=tmp_path, ranks=RankChannel(gather=gather))
    preparation.run(on_bad_sample="error", devices=["cpu"])
    assert len(meetings) > 2
    assert equal(contents(preparation.dataset()), contents(mixed_dataset))


@pytest.mark.slow
def test_two_preparations_with_different_rules_never_mix(mixed_manifest, make_rules, tmp_path):
    """Two forms of the same samples, and another choice of them."""
    forms = [make_rules(), make_rules(reference_turn="assistant"), make_rules(max_audio_s=0.9)]
    alone = [
        contents(build_dataset(mixed_manifest, rules=rules, cache_dir=tmp_path, on_bad_sample="skip"))
        for rules in forms
    ]
    assert not any(equal(alone[first], alone[second]) for first, second in ((0, 1), (0, 2), (1, 2)))
    context = multiprocessing.get_context("fork")
    wrong = []
    for number in range(ROUNDS):
        start = context.Barrier(2)
        pair = [number % 3, (number + 1) % 3]
        processes = [
            context.Process(
                target=prepare_and_compare, args=(start, alone[form], mixed_manifest, forms[form], tmp_path)
            )
            for form in pair
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        wrong += [(number, process.exitcode) for process in processes if process.exitcode]
    assert not wrong, f"{len(wrong)} of {2 * ROUNDS} data sets are wrong (round, exit status): {wrong[:10]}"
