"""One sample, several forms: what servers would send is made of every voice-cloning sample, and epochs mix the two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from boson_multimodal.data_types import AudioContent

from ds_higgs.data.build import build_dataset
from ds_higgs.data.chatml import parse_sample, tokenize
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.loader import StepLoader
from ds_higgs.data.order import EpochOrder
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.prompt_forms import (
    SERVED_SYSTEM_MESSAGE,
    SYSTEM_MESSAGE,
    VoiceRequest,
    take_form,
    write_sample,
)

from .audio_files import cloning_sample, text_sample

REFERENCE, TARGET = ({"type": "audio", "audio_url": name} for name in ("ref.wav", "target.wav"))


def shown(sample):
    return [
        (message.role, [item.audio_url if isinstance(item, AudioContent) else item.text for item in message.content])
        for message in sample.messages
    ]


def served(sample):
    return take_form(parse_sample(sample), "boson", "as_is")


def asked(user, answer, **fields):
    """What becomes of one question and its answer."""
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return [content for _, content in shown(served({"messages": messages, **fields}).sample)[1:]]


def test_the_seeds_sample_becomes_what_servers_send():
    sample = cloning_sample("ref.wav", "target.wav", text="مرحبا بكم.")
    sample["messages"][0]["content"] = SYSTEM_MESSAGE
    moved = served(sample)
    assert shown(moved.sample) == [
        ("system", ["Generate audio following instruction."]),
        ("user", ["What the reference says."]),
        ("assistant", ["ref.wav"]),
        ("user", ["مرحبا بكم."]),
        ("assistant", ["target.wav"]),
    ]
    assert moved.references == {0}


@pytest.mark.parametrize("system", ["A noisy street.", SERVED_SYSTEM_MESSAGE])
def test_a_system_text_of_ones_own_stays(system):
    sample = cloning_sample("ref.wav", "target.wav")
    sample["messages"][0]["content"] = f"{system}\n"
    assert shown(served(sample).sample)[0] == ("system", [system])


@pytest.mark.parametrize("system", [None, SYSTEM_MESSAGE])
@pytest.mark.parametrize("start_index", [None, 0, 1])
def test_what_is_learned_stays_learned_where_a_system_message_is_added(system, start_index):
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": [TARGET]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    moved = served({"messages": messages, "start_index": start_index}).sample
    assert shown(moved)[0] == ("system", [SERVED_SYSTEM_MESSAGE])
    expected = None if start_index is None else start_index + (system is None)
    assert moved.start_index == expected


@pytest.mark.parametrize(
    ("user", "answer", "expected"),
    [
        ("Please generate speech for: Hi  there.", ["Hi there.", TARGET], "Hi  there."),
        ("Read this aloud:\nHi.", ["Hi.", TARGET], "Hi."),
        (["Please generate speech for:", " Hi."], ["Hi.", TARGET], "Hi."),
        (" Hi. ", [TARGET], "Hi."),
        ("Please generate speech for: Hi.", [TARGET], "Hi."),
        ("Hi.", ["Hi.", TARGET], "Hi."),
    ],
)
def test_phrase_and_echo_are_dropped(user, answer, expected):
    assert asked(user, answer) == [[expected], ["target.wav"]]


@pytest.mark.parametrize(
    ("user", "answer"),
    [("How are you?", "Fine."), ("Is it yes or no?", "no?"), ("Well: yes and", "yes")],
)
def test_an_answer_in_words_of_its_own_stays(user, answer):
    assert asked(user, [answer, TARGET]) == [[user], [answer, "target.wav"]]


@pytest.mark.parametrize("sample", [text_sample(), text_sample("Please generate speech for: a", "a")])
def test_a_sample_of_text_alone_stays(sample):
    parsed = parse_sample(sample)
    assert take_form(parsed, "boson", "assistant").sample == parsed


def test_a_reference_that_says_nobody_knows_what_is_refused():
    user = [REFERENCE, "Please generate speech for: Hi."]
    with pytest.raises(BadSampleError, match="no text before the reference audio"):
        asked(user, ["Hi.", TARGET])
    with pytest.raises(BadSampleError, match="nobody knows what the reference says"):
        write_sample(VoiceRequest("Hi.", TARGET, REFERENCE), "boson")


def test_reading_and_writing_agree(make_rules, example_dir):
    """Every sample of the example: made served while reading, or written so. Doing it twice changes nothing."""
    rules = make_rules()
    samples = json.loads((example_dir / "train.json").read_text(encoding="utf-8"))
    for sample in samples:
        said, reference, request = sample["messages"][1]["content"]
        text, target = sample["messages"][2]["content"]
        assert request["text"].endswith(text["text"])
        voice = VoiceRequest(text["text"], target, reference, said["text"])
        assert write_sample(voice, "as_is")["messages"] == sample["messages"]
        read = served(sample)
        written = served(write_sample(voice, "boson"))
        assert shown(written.sample) == shown(read.sample)
        assert written.references == set()
        first, second = (
            tokenize(one.sample, rules.tokenizer, rules.layout, references=one.references) for one in (read, written)
        )
        assert (first.tokens, first.supervised) == (second.tokens, second.supervised)


@pytest.fixture(scope="module")
def mixed(example_dir: Path, make_rules, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    forms = ("as_is", "boson", "mixed")
    return {
        form: build_dataset(example_dir / "train.json", rules=make_rules(prompt_form=form), cache_dir=cache)
        for form in forms
    }


def forms_in(mixed, epoch: int, seed: int = 0) -> list[str]:
    """The form of each sample in an epoch."""
    samples = mixed["mixed"].in_epoch(epoch, seed=seed)
    forms = []
    for index in range(len(samples)):
        matching = [form for form in ("as_is", "boson") if samples[index].input_ids.equal(mixed[form][index].input_ids)]
        assert len(matching) == 1
        assert samples[index].label_ids.equal(mixed[matching[0]][index].label_ids)
        assert samples[index].audio_ids_concat.equal(mixed["as_is"][index].audio_ids_concat)
        forms += matching
    return forms


def test_an_epoch_has_as_many_samples_in_each_form(mixed):
    first, second = forms_in(mixed, 0), forms_in(mixed, 1)
    assert first.count("boson") == second.count("boson") == len(first) // 2
    assert first != second
    assert first == forms_in(mixed, 0)
    assert first != forms_in(mixed, 0, seed=1)


def test_lengths_hold_in_every_form(mixed):
    lengths = [mixed[form].lengths for form in ("as_is", "boson", "mixed")]
    assert np.array_equal(np.maximum(lengths[0], lengths[1]), lengths[2])


def test_a_mixed_epoch_goes_on_where_it_was(mixed, make_rules):
    def make():
        return StepLoader(EpochOrder(mixed["mixed"], batch_size=4, seed=3), BatchCollator(make_rules().layout))

    loader = make()
    epochs = [[batch for [batch] in loader] for _ in range(2)]
    again = make()
    again.epoch = 1
    steps = iter(again)
    next(steps)
    state = again.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    rest = [batch for [batch] in resumed]
    assert len(rest) == len(epochs[1]) - 1
    for batch, expected in zip(rest, epochs[1][1:], strict=True):
        assert batch.sample_ids == expected.sample_ids
        assert torch.equal(batch.labels.text, expected.labels.text)
        assert all(torch.equal(batch.model_inputs[name], expected.model_inputs[name]) for name in batch.model_inputs)
