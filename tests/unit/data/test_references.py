"""Reference audio moved into an earlier exchange."""

import pytest
from boson_multimodal.data_types import AudioContent

from ds_higgs.data.build import build_dataset
from ds_higgs.data.chatml import parse_sample
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.references import move_references

from .audio_files import cloning_sample, text_sample

AUDIO = {"type": "audio", "audio_url": "a.wav"}


def shown(sample):
    return [
        (message.role, [item.audio_url if isinstance(item, AudioContent) else item.text for item in message.content])
        for message in sample.messages
    ]


def test_the_reference_becomes_an_exchange_that_is_not_learned():
    moved = move_references(parse_sample(cloning_sample("ref.wav", "target.wav", text="Hello.")))
    assert shown(moved) == [
        ("system", ["Speak in the voice of the reference."]),
        ("user", ["What the reference says."]),
        ("assistant", ["ref.wav"]),
        ("user", ["Please generate speech for: Hello."]),
        ("assistant", ["Hello.", "target.wav"]),
    ]
    assert moved.start_index == 3


def test_several_references_become_several_exchanges():
    content = ["one", AUDIO, "two", {**AUDIO, "audio_url": "b.wav"}, "request"]
    sample = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": AUDIO}]}
    moved = move_references(parse_sample(sample))
    assert [role for role, _ in shown(moved)] == ["user", "assistant"] * 3
    assert shown(moved)[1] == ("assistant", ["a.wav"])
    assert shown(moved)[3] == ("assistant", ["b.wav"])
    assert moved.start_index == 4


@pytest.mark.parametrize("sample", [{"messages": [{"role": "assistant", "content": AUDIO}]}])
def test_a_sample_without_user_audio_stays_as_it_is(sample):
    parsed = parse_sample(sample)
    assert move_references(parsed) == parsed


def test_a_sample_of_text_stays_as_it_is():
    parsed = parse_sample(text_sample())
    assert move_references(parsed) == parsed


@pytest.mark.parametrize(
    ("content", "message"),
    [([AUDIO, "request"], "no text before the reference audio"), (["text", AUDIO], "no text after the reference")],
)
def test_what_cannot_be_moved_is_refused(content, message):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": AUDIO}]
    with pytest.raises(BadSampleError, match=message):
        move_references(parse_sample({"messages": messages}))


def test_a_reference_after_learned_audio_is_refused():
    user = {"role": "user", "content": ["text", AUDIO, "request"]}
    messages = [user, {"role": "assistant", "content": AUDIO}] * 2
    with pytest.raises(BadSampleError, match=r"messages\[2\]: reference audio after audio that is learned"):
        move_references(parse_sample({"messages": messages}))


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
