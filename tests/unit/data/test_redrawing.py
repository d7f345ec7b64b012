"""References drawn anew: the very tokens and codes of a sample written with another clip of its speaker."""

import copy
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from ds_higgs.data.build import Preparation, build_dataset
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.conditions import DropRates
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.oversampling import oversample_short
from ds_higgs.data.prompt_forms import VoiceRequest, write_sample
from ds_higgs.data.redrawing import KEEPS_ITS_OWN
from ds_higgs.data.sampling import plan_epoch
from ds_higgs.errors import UserError

from .audio_files import text_sample, write_tone

SEED = 5
NUM_CLIPS = 7
SPEAKERS = {"ana": range(4), "bo": range(4, 7)}


def audio(number):
    return {"type": "audio", "audio_url": f"{number}.wav"}


def says(number):
    """What clip `number` says, of another number of tokens each."""
    return "This is" + " really" * number + " it."


def sample(target, reference, speaker, form="as_is"):
    heard = None if reference is None else audio(reference)
    text = None if reference is None else says(reference)
    return {**write_sample(VoiceRequest(says(target), audio(target), heard, text), form), "speaker": speaker}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Clips that all the manifests share, and their codes."""
    folder = tmp_path_factory.mktemp("redrawn")
    for number in range(NUM_CLIPS):
        write_tone(folder / f"{number}.wav", 0.3 + 0.1 * number, seed=number)
    return folder


def write_manifest(folder, samples):
    manifest = folder / f"train{hashlib.sha256(repr(samples).encode()).hexdigest()[:8]}.json"
    manifest.write_text(json.dumps(samples))
    return manifest


def every_sample(form="as_is"):
    """Each clip of a speaker as target of a sample whose reference is the speaker's next one."""
    return [
        sample(clip, clips[(place + 1) % len(clips)], name, form)
        for name, clips in SPEAKERS.items()
        for place, clip in enumerate(clips)
    ]


def build(manifest, rules, **changes):
    return build_dataset(manifest, rules=replace(rules, **changes), cache_dir=manifest.parent / "cache")


def assert_equal(one, other):
    for name in ("input_ids", "label_ids", "audio_ids_concat", "audio_ids_start"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("written", ["as_is", "boson"])
@pytest.mark.parametrize("form", ["as_is", "boson", "mixed"])
def test_a_redrawn_sample_is_the_one_written_with_that_reference(make_rules, place, form, written):
    rules = make_rules(prompt_form=form)
    dataset = build(write_manifest(place, every_sample(written)), rules, redraw=True)
    pairs = [(t, r) for clips in SPEAKERS.values() for t in clips for r in clips if t != r]
    written_so = [sample(t, r, "x", written) for t, r in pairs]
    expected = build(write_manifest(place, written_so), rules)
    seen = Counter()
    for epoch in range(12):
        found = dataset.in_epoch(epoch, seed=SEED)
        for target in range(NUM_CLIPS):
            drawn = found[target]
            options = [
                (pair, expected.read(row, served=served))
                for row, pair in enumerate(pairs)
                for served in ([False, True] if form == "mixed" else [False])
                if pair[0] == target
            ]
            same = [(pair, one) for pair, one in options if torch.equal(one.input_ids, drawn.input_ids)]
            same = [pair for pair, one in same if torch.equal(one.audio_ids_concat, drawn.audio_ids_concat)]
            assert same, f"sample {target} in epoch {epoch} is none of those that it may be"
            seen[same[0]] += 1
            assert_equal(
                drawn,
                next(one for pair, one in options if pair == same[0] and torch.equal(one.input_ids, drawn.input_ids)),
            )
            taken = (
                len(drawn.input_ids)
                - 2
                + sum(int(rules.layout.stream_length(drawn.get_audio_codes(clip).shape[1])) for clip in range(2))
            )
            assert found.lengths[target] == taken <= dataset.lengths[target]
    assert set(seen) == set(pairs), "every other clip of the speaker comes in some epoch"


def test_what_is_drawn_is_even_and_follows_from_seed_and_epoch(make_rules, place):
    manifest = write_manifest(place, every_sample())
    dataset, again = (build(manifest, make_rules(), redraw=True) for _ in range(2))
    counts = Counter()
    for epoch in range(600):
        drawn = dataset.references.draw(seed=SEED, epoch=epoch)
        counts.update(zip(range(NUM_CLIPS), drawn.uses.tolist(), strict=True))
        if epoch < 5:
            np.testing.assert_array_equal(drawn.uses, again.references.draw(seed=SEED, epoch=epoch).uses)
    of_ana = [count for (row, _), count in counts.items() if row in SPEAKERS["ana"]]
    assert len(of_ana) == 4 * 3
    assert min(of_ana) > 150
    assert max(of_ana) < 250


def test_a_copy_of_the_target_is_never_the_reference(make_rules, place):
    """Under another name, in another sample, cut to its whole length: it stays the target's audio."""
    shutil.copy(place / "0.wav", place / "copy.wav")
    duration = 0.3
    whole = {**audio(0), "offset": 0.0, "duration": duration}
    samples = [
        sample(0, 1, "ana"),
        {
            **write_sample(
                VoiceRequest("Copied.", {"type": "audio", "audio_url": "copy.wav"}, audio(1), "One."), "as_is"
            ),
            "speaker": "ana",
        },
        {**write_sample(VoiceRequest("Cut.", whole, audio(1), "One."), "as_is"), "speaker": "ana"},
        sample(2, 1, "ana"),
        sample(2, 0, "ana"),
    ]
    manifest = write_manifest(place, samples)
    dataset, plain = (build(manifest, make_rules(), redraw=redraw) for redraw in (True, False))
    codes = {0: plain[0].get_audio_codes(1), 1: plain[0].get_audio_codes(0), 2: plain[3].get_audio_codes(1)}
    for row, target in enumerate((0, 0, 0, 2, 2)):
        heard = [dataset.in_epoch(epoch, seed=SEED)[row].get_audio_codes(0) for epoch in range(30)]
        others = [codes[one] for one in codes if one != target]
        assert all(any(torch.equal(one, other) for other in others) for one in heard)
        assert all(any(torch.equal(one, other) for one in heard) for other in others)


def test_what_cannot_be_redrawn_keeps_its_own_and_is_told(make_rules, place, caplog):
    two = sample(0, 1, "ana")
    two["messages"][1]["content"] = [*two["messages"][1]["content"][:2], audio(2), two["messages"][1]["content"][2]]
    echo_twice = sample(3, 2, "ana", "boson")
    echo_twice["messages"][2]["content"] = [{"type": "text", "text": "Again."}, audio(2)]
    phrase = copy.deepcopy(sample(3, 2, "ana", "boson"))
    phrase["messages"][1]["content"] = "Please generate speech for: this."
    samples = [
        *(two, echo_twice, phrase, sample(4, 5, "bo"), sample(0, 1, None), sample(1, None, "ana"), text_sample()),
        *(sample(0, 1, "ana"), sample(2, 3, "ana")),
    ]
    manifest = write_manifest(place, [{key: v for key, v in one.items() if v is not None} for one in samples])
    with caplog.at_level("INFO", logger="ds_higgs"):
        dataset = build(manifest, make_rules(), redraw=True)
    assert "references of 2 samples of 1 speakers are redrawn" in caplog.text
    assert "5 of 7 samples keep their own reference" in caplog.text
    assert dataset.references.rows.tolist() == [7, 8]
    drawn = dataset.references.draw(seed=SEED, epoch=0)
    assert (drawn.uses[:7] == KEEPS_ITS_OWN).all()
    for row in range(7):
        assert_equal(dataset.in_epoch(0, seed=SEED)[row], build(manifest, make_rules())[row])
    preparation = Preparation(manifest, rules=make_rules(), cache_dir=place / "cache")
    preparation.analyse()
    statistics = preparation.statistics()
    assert (statistics.redrawable_samples, statistics.redrawable_speakers) == (2, 1)


def test_without_words_in_the_prompt_none_come(make_rules, place):
    samples = every_sample()
    for one in samples:
        one["messages"][1]["content"] = one["messages"][1]["content"][1:]
    dataset = build(write_manifest(place, samples), make_rules(), redraw=True)
    assert len(dataset.references.rows) == NUM_CLIPS
    for epoch in range(3):
        found = dataset.in_epoch(epoch, seed=SEED)
        for row in range(NUM_CLIPS):
            assert torch.equal(found[row].input_ids, dataset[row].input_ids)


def test_no_sample_grows_beyond_the_budget(make_rules, place):
    firsts = [sample(clip, clips[clip == clips[0]], name) for name, clips in SPEAKERS.items() for clip in clips]
    manifest = write_manifest(place, firsts)
    plain = build(manifest, make_rules())
    budget = -(-int(plain.lengths.max()) // 8) * 8
    dataset = build(manifest, make_rules(max_tokens=budget), redraw=True)
    free = build(manifest, make_rules(), redraw=True)
    assert dataset.lengths.max() <= budget < free.lengths.max()
    assert 6 not in dataset.references.rows, "its only other reference is too long beside it"
    assert {0, 1, 2, 3, 4} <= set(dataset.references.rows.tolist())
    order = EpochOrder(dataset, max_tokens=budget, seed=SEED)
    collator = BatchCollator(make_rules().layout)
    for epoch in range(6):
        lengths = dataset.in_epoch(epoch, seed=SEED).lengths
        assert lengths.max() <= budget
        for draw in order.draws(epoch):
            batch = collator([order.samples(0, epoch)[index] for index in draw.samples], ["x"] * len(draw.samples))
            assert batch.num_tokens == lengths[draw.samples].sum()
            expanded = batch.model_inputs.expanded
            assert expanded.batch_size * expanded.grid_length <= budget
    for larger in range(budget, 4 * budget, 16):
        fuller = EpochOrder(dataset, max_tokens=larger, seed=SEED)
        plan = plan_epoch(dataset.in_epoch(1, seed=SEED).lengths, seed=SEED, epoch=1, max_tokens=larger)
        assert [draw.samples.tolist() for draw in fuller.draws(1)] == [plan[n].tolist() for n in range(len(plan))]


def names_and_frames(loader, steps):
    found = []
    for _, step in zip(range(steps), loader, strict=False):
        found += [(batch.sample_ids, batch.model_inputs["audio_in_ids"].tolist()) for batch in step]
    return found


def test_a_run_goes_on_with_the_references_that_it_would_have_drawn(make_rules, place):
    rules = replace(make_rules(), redraw=True, drops=DropRates(reference=0.3))
    manifest = write_manifest(place, every_sample())

    def loader(source=None):
        source = source or build_dataset(manifest, rules=rules, cache_dir=place / "cache")
        return StepLoader(EpochOrder(source, batch_size=2, seed=SEED), BatchCollator(rules.layout))

    whole = loader()
    expected = [names_and_frames(whole, 4) for _ in range(2)]
    assert expected[0] != expected[1]
    first = loader()
    done = names_and_frames(first, 1)
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    assert done + names_and_frames(resumed, 3) == expected[0]

    plain = loader(build(manifest, make_rules()))
    with pytest.raises(UserError, match="reference was redraw, is None"):
        plain.load_state_dict(first.state_dict())
    short = oversample_short(build(manifest, rules), frames=10**6, times=3)
    assert len(names_and_frames(loader(short), 20)) == 11
    np.testing.assert_array_equal(
        short.in_epoch(1, seed=SEED).lengths, np.tile(build(manifest, rules).in_epoch(1, seed=SEED).lengths, 3)
    )


def test_references_of_nobody_in_particular_are_refused(make_rules, place):
    samples = [{"messages": sample(0, 1, "x")["messages"]}, {"messages": sample(1, 0, "x")["messages"]}]
    with pytest.raises(
        UserError, match=r"train\w+.json: data.reference is redraw, and none of 2 samples names its speaker"
    ):
        build(write_manifest(place, samples), make_rules(), redraw=True)
    alone = write_manifest(place, [{"messages": sample(0, None, "x")["messages"]}])
    assert not len(build(alone, make_rules(), redraw=True).references.rows)
