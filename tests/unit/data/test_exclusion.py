"""`data.exclude`: what it leaves out, on any number of ranks, and what it refuses."""

import dataclasses

import pytest

from ds_higgs.config import DataConfig
from ds_higgs.data.build import Preparation
from ds_higgs.data.exclusion import read_exclude_list
from ds_higgs.data.ranks import RankChannel
from ds_higgs.errors import UserError
from ds_higgs.setup import build_sample_rules
from tests.support.rank_threads import RankThreads


def test_named_samples_are_left_out(example_dir, tiny_base, tmp_path):
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("# noisy\ntrain.json:0\n\n train.json:5 \nval.json:2\n")
    manifests = {"train_manifest": example_dir / "train.json", "val_manifest": example_dir / "val.json"}
    rules = build_sample_rules(DataConfig(**manifests, exclude=exclude), tiny_base)
    for manifest, kept, gone in ((manifests["train_manifest"], 22, {0, 5}), (manifests["val_manifest"], 7, {2})):
        preparation = Preparation(manifest, rules=rules, cache_dir=tmp_path / "codes")
        preparation.analyse()
        assert preparation.num_samples == kept
        assert preparation.num_excluded == len(gone)
        assert gone.isdisjoint(preparation.samples.column("number").tolist())


@pytest.mark.parametrize("name", ["train.json:24", "train.json:900"])
def test_a_name_beyond_the_manifest_is_refused_on_every_rank(example_dir, make_rules, tmp_path, name):
    rules = dataclasses.replace(make_rules(), exclude=frozenset({name, "train.json:1"}))
    threads = RankThreads(2)

    def analyse(rank):
        ranks = RankChannel(rank, 2, threads.gather_of(rank))
        with pytest.raises(UserError) as caught:
            Preparation(example_dir / "train.json", rules=rules, cache_dir=tmp_path / "codes", ranks=ranks).analyse()
        return str(caught.value)

    errors = threads.run(analyse)
    assert errors[0] == errors[1]
    assert f"1 samples are not in {example_dir / 'train.json'}" in errors[0]
    assert name in errors[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train.json:1\nother.json:2\ntrain.json\n", r"(?s)exclude\.txt:2: 'other\.json:2'.*:3: 'train\.json'"),
        (b"train.json:1\ntrain.json:x", r"such as train\.json:3\n  - exclude\.txt:2: 'train\.json:x'"),
        (b"\xff", "not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_lines_that_are_no_names(tmp_path, content, message):
    path = tmp_path / "exclude.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_exclude_list(path, [tmp_path / "train.json"])
