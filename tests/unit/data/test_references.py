"""Reference audio moved into an earlier exchange."""

from itertools import groupby

import pytest
from boson_multimodal.data_types import AudioContent

from ds_higgs.data.build import build_dataset
from ds_higgs.data.chatml import parse_sample, tokenize
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.references import MovedSample, move_references
from ds_higgs.layout import AudioLayout
from ds_higgs.model.loading import load_tokenizer, read_model_config

from .audio_files import cloning_sample, text_sample

AUDIO = {"type": "audio", "audio_url": "a.wav"}


def shown(moved):
    return [
        (message.role, [item.audio_url if isinstance(item, AudioContent) else item.text for item in message.content])
        for message in moved.sample.messages
    ]


def learned_parts(sample, tokenizer, layout):
    """What is learned of a sample whose reference has been moved: the runs of supervised tokens, decoded."""
    moved = move_references(parse_sample(sample))
    found = tokenize(moved.sample, tokenizer, layout, references=moved.references)
    runs = [
        list(run) for on, run in groupby(zip(found.tokens, found.supervised, strict=True), lambda pair: pair[1]) if on
    ]
    return [tokenizer.decode([token for token, _ in run]) for run in runs]


AUDIO_TURN = "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>"


def exchange(content, answer):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def test_the_reference_becomes_an_exchange_that_is_not_learned():
    moved = move_references(parse_sample(cloning_sample("ref.wav", "target.wav", text="Hello.")))
    assert shown(moved) == [
        ("system", ["Speak in the voice of the reference."]),
        ("user", ["What the reference says."]),
        ("assistant", ["ref.wav"]),
        ("user", ["Please generate speech for: Hello."]),
        ("assistant", ["Hello.", "target.wav"]),
    ]
    assert moved.references == {0}


def test_several_references_become_several_exchanges():
    content = ["one", AUDIO, "two", {**AUDIO, "audio_url": "b.wav"}, "request"]
    sample = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": AUDIO}]}
    moved = move_references(parse_sample(sample))
    assert [role for role, _ in shown(moved)] == ["user", "assistant"] * 3
    assert shown(moved)[1] == ("assistant", ["a.wav"])
    assert shown(moved)[3] == ("assistant", ["b.wav"])
    assert moved.references == {0, 1}


@pytest.mark.parametrize("sample", [{"messages": [{"role": "assistant", "content": AUDIO}]}])
def test_a_sample_without_user_audio_stays_as_it_is(sample):
    parsed = parse_sample(sample)
    assert move_references(parsed) == MovedSample(parsed, frozenset())


def test_a_sample_of_text_stays_as_it_is():
    parsed = parse_sample(text_sample())
    assert move_references(parsed) == MovedSample(parsed, frozenset())


@pytest.mark.parametrize(
    ("content", "message"),
    [([AUDIO, "request"], "no text before the reference audio"), (["text", AUDIO], "no text after the reference")],
)
def test_what_cannot_be_moved_is_refused(content, message):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": AUDIO}]
    with pytest.raises(BadSampleError, match=message):
        move_references(parse_sample({"messages": messages}))


def test_a_reference_after_learned_audio_is_moved_too(tiny_base):
    messages = exchange(["one", AUDIO, "request"], AUDIO) + exchange(["two", AUDIO, "request"], AUDIO)
    layout = AudioLayout.from_config(read_model_config(tiny_base))
    assert learned_parts({"messages": messages}, load_tokenizer(tiny_base), layout) == [f"{AUDIO_TURN}<|eot_id|>"] * 2
    assert move_references(parse_sample({"messages": messages})).references == {0, 2}


@pytest.mark.parametrize(
    ("start_index", "learned"),
    [
        (None, ["Yes.<|eot_id|>", f"{AUDIO_TURN}<|eot_id|>"]),
        (1, ["Yes.<|eot_id|>", f"{AUDIO_TURN}<|eot_id|>"]),
        (2, [f"{AUDIO_TURN}<|eot_id|>"]),
    ],
)
def test_what_is_learned_before_the_reference_is_learned_after_the_move(start_index, learned, tiny_base):
    messages = exchange("Ready?", "Yes.") + exchange(["what it says", AUDIO, "request"], AUDIO)
    sample = {"messages": messages, "start_index": start_index}
    layout = AudioLayout.from_config(read_model_config(tiny_base))
    assert learned_parts(sample, load_tokenizer(tiny_base), layout) == learned


def test_context_after_the_reference_stays_context(tiny_base):
    messages = exchange(["what it says", AUDIO, "first"], AUDIO) + exchange("second", "text") + exchange("third", AUDIO)
    layout = AudioLayout.from_config(read_model_config(tiny_base))
    for start_index, count in ((None, 3), (2, 2), (3, 2), (4, 1)):
        sample = {"messages": messages, "start_index": start_index}
        assert len(learned_parts(sample, load_tokenizer(tiny_base), layout)) == count


def test_it_changes_the_placeholders_but_not_what_is_learned(mixed_manifest, mixed_dataset, make_rules, tmp_path):
    rules = make_rules(reference_turn="assistant")
    moved = build_dataset(mixed_manifest, rules=rules, cache_dir=tmp_path)
    layout = rules.layout
    for index in range(7):
        before, after = mixed_dataset[index], moved[index]
        assert (before.input_ids == layout.audio_in_token).sum() == 1
        assert (after.input_ids == layout.audio_in_token).sum() == 0
        assert (after.input_ids == layout.audio_out_token).sum() == 2
        assert (after.label_ids == layout.audio_out_token).sum() == 1
        assert moved.count_targets(index) == mixed_dataset.count_targets(index)
        assert after.audio_ids_concat.equal(before.audio_ids_concat)
