"""Prompts without parts of theirs: the very tokens of a sample written without them, as often as asked for."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.data.build import build_dataset
from ds_higgs.data.chatml import parse_sample, tokenize
from ds_higgs.data.conditions import NOTHING, Dropped, DropRates, PromptParts, draw_dropped
from ds_higgs.data.prompt_forms import take_form

from .audio_files import cloning_sample, text_sample, write_tone

SAMPLE = cloning_sample("reference.wav", "target.wav", "Say <this> twice.")
SYSTEM, USER, ANSWER = SAMPLE["messages"]
HEARD, REFERENCE, REQUEST = USER["content"]
DROPS = {
    "reference": Dropped(True, False, False),
    "both": Dropped(True, True, False),
    "text": Dropped(False, True, False),
    "system": Dropped(False, False, True),
    "all": Dropped(True, True, True),
}


def asked(*content):
    return {"role": "user", "content": list(content)}


def answer(*content):
    return {"role": "assistant", "content": list(content)}


SERVED_SYSTEM = {"role": "system", "content": "Generate audio following instruction."}
SERVED = [SERVED_SYSTEM, asked(HEARD), answer(REFERENCE), asked("Say this."), answer(ANSWER["content"][1])]
LEFT = {
    "as_is": {
        "reference": [SYSTEM, asked(REQUEST), ANSWER],
        "both": [SYSTEM, asked(REQUEST), ANSWER],
        "text": [SYSTEM, asked(REFERENCE, REQUEST), ANSWER],
        "system": [USER, ANSWER],
        "all": [asked(REQUEST), ANSWER],
    },
    "served": {
        "reference": [SERVED[0], *SERVED[3:]],
        "both": [SERVED[0], *SERVED[3:]],
        "text": [SERVED[0], *SERVED[2:]],
        "system": SERVED[1:],
        "all": SERVED[3:],
    },
}


@pytest.fixture(scope="module")
def parts_of(make_rules):
    """Tokens and supervision of messages, and those that stay of them."""
    rules = make_rules()
    parts = PromptParts.of(rules.tokenizer, rules.layout)

    def run(messages, dropped=NOTHING, *, first_learned=None):
        sample = parse_sample({"messages": copy.deepcopy(messages), "start_index": first_learned})
        taken = take_form(sample, "as_is", "as_is")
        found = tokenize(taken.sample, rules.tokenizer, rules.layout, references=taken.references)
        tokens, supervised = np.asarray(found.tokens), np.asarray(found.supervised)
        kept = parts.keep(tokens, supervised, dropped)
        return tokens[kept].tolist(), supervised[kept].tolist()

    return run


@pytest.mark.parametrize("form", LEFT)
@pytest.mark.parametrize("what", DROPS)
def test_what_is_left_is_the_sample_written_without_it(parts_of, form, what):
    whole, first_learned = (SAMPLE["messages"], None) if form == "as_is" else (SERVED, 3)
    left = LEFT[form][what]
    found = parts_of(whole, DROPS[what], first_learned=first_learned)
    has_reference_turn = form == "served" and what in ("text", "system")
    expected = parts_of(left, first_learned=left.index(SERVED[3]) if has_reference_turn else None)
    opening = parts_of(whole)[0][:1]  # <|begin_of_text|> stays where the first message goes
    assert found[0][:1] == expected[0][:1] == opening
    assert found == expected
    assert len(found[0]) < len(parts_of(whole)[0])


@pytest.mark.parametrize(
    "messages",
    [
        [asked(REFERENCE), answer(ANSWER["content"][1])],  # a spoken question
        [asked("Hello."), answer("Yes?"), asked("Speak."), ANSWER],
        text_sample()["messages"],
    ],
)
def test_what_is_no_reference_stays(parts_of, messages):
    assert parts_of(messages, DROPS["both"]) == parts_of(messages)


def test_draws_are_as_often_as_asked_and_others_in_each_epoch():
    rates = DropRates(reference=0.1, reference_text=0.3, system=0.0)
    first, second = (draw_dropped(rates, 200_000, seed=3, epoch=epoch) for epoch in range(2))
    assert first.mean(axis=0) == pytest.approx([0.1, 0.3, 0.0], abs=0.01)
    assert (first & second).mean(axis=0) == pytest.approx([0.01, 0.09, 0.0], abs=0.01)
    np.testing.assert_array_equal(first, draw_dropped(rates, 200_000, seed=3, epoch=0))


@pytest.mark.parametrize("form", ["as_is", "boson", "mixed"])
def test_an_epochs_samples_lack_audio_and_tokens_and_learn_the_same(make_rules, tmp_path, form):
    for number, name in enumerate(("reference", "target", "other")):
        write_tone(tmp_path / f"{name}.wav", 0.3 + 0.2 * number, seed=number)
    samples = [cloning_sample("reference.wav", target, "Twelve.") for target in ("target.wav", "other.wav") * 10]
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps(samples))
    rules = make_rules(prompt_form=form)
    plain = build_dataset(manifest, rules=rules, cache_dir=tmp_path / "cache")
    rules = replace(rules, drops=DropRates(reference=0.5))
    dropping = build_dataset(manifest, rules=rules, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(dropping.lengths, plain.lengths)
    lacking = 0
    for epoch in range(2):
        whole, found = plain.in_epoch(epoch, seed=1), dropping.in_epoch(epoch, seed=1)
        for index in range(len(samples)):
            before, after = whole[index], found[index]
            assert torch.equal(learned(before), learned(after))
            assert torch.equal(before.get_audio_codes(1), after.get_audio_codes(len(after.audio_ids_start) - 1))
            lacking += len(after.audio_ids_start) == 1
            assert (len(after.audio_ids_start) == 1) == (len(after.input_ids) < len(before.input_ids))
    assert 10 <= lacking <= 30


def learned(sample):
    return sample.label_ids[sample.label_ids != IGNORE_INDEX]
