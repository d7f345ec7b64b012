"""Prompts are the beginnings of training samples, token by token and code by code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.data.build import build_dataset
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.prompts import build_voice_prompt, collate_prompt, cut_prompt, spoken_text
from ds_higgs.data.rules import SampleRules, build_rules
from ds_higgs.model.loading import load_tokenizer, read_model_config


@pytest.fixture(scope="module")
def rules(tiny_base: Path) -> SampleRules:
    config = read_model_config(tiny_base)
    return build_rules(tokenizer=load_tokenizer(tiny_base), model_config=config, codec=find_codec(None, tiny_base))


@pytest.fixture(scope="module")
def dataset(rules: SampleRules, example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> HiggsDataset:
    return build_dataset(example_dir / "val.json", rules=rules, cache_dir=tmp_path_factory.mktemp("codes"))


def test_a_prompt_ends_where_the_target_begins(dataset: HiggsDataset, rules: SampleRules):
    sample = dataset[0]
    prompt = cut_prompt(sample, rules.layout)
    assert prompt is not None
    length = len(prompt.sample.input_ids)
    assert torch.equal(prompt.sample.input_ids, sample.input_ids[:length])
    assert sample.input_ids[length] == rules.layout.audio_out_token
    assert rules.tokenizer.decode(prompt.sample.input_ids).endswith("<|audio_out_bos|>")
    assert torch.equal(prompt.sample.audio_ids_concat, sample.get_audio_codes(0))
    assert torch.equal(prompt.reference_codes, sample.get_audio_codes(0))
    assert torch.equal(prompt.target_codes, sample.get_audio_codes(1))


def test_the_collated_prompt_is_the_beginning_of_the_training_batch(dataset: HiggsDataset, rules: SampleRules):
    collator = BatchCollator(rules.layout)
    trained = collator([dataset[0]], ["x"]).model_inputs
    prompt = cut_prompt(dataset[0], rules.layout)
    inputs = collate_prompt(prompt, collator)
    length = inputs["input_ids"].shape[1]
    assert length % 8, "a length that the collator pads, or this shows nothing"
    assert torch.equal(inputs["input_ids"], trained["input_ids"][:, :length])
    assert inputs["attention_mask"].all()
    assert torch.equal(inputs["audio_in_ids"], trained["audio_in_ids"])
    assert inputs["audio_out_ids"].shape == (8, 0)


def test_a_sample_without_audio_to_learn_has_no_prompt(dataset: HiggsDataset, rules: SampleRules):
    sample = dataset[0]
    sample.label_ids[:] = IGNORE_INDEX
    assert cut_prompt(sample, rules.layout) is None


@pytest.mark.parametrize(("form", "reference_turn"), [("as_is", "as_is"), ("as_is", "assistant"), ("boson", "as_is")])
def test_a_text_with_a_reference_is_prompted_as_the_example_is_trained(
    rules: SampleRules, example_dir: Path, tmp_path: Path, form, reference_turn
):
    rules = replace(rules, prompt_form=form, reference_turn=reference_turn)
    dataset = build_dataset(example_dir / "val.json", rules=rules, cache_dir=tmp_path)
    trained = cut_prompt(dataset[0], rules.layout)
    built = build_voice_prompt(
        "We walked along the river until dusk.",
        reference_text="Nobody heard the second bell ring.",
        reference_codes=dataset[0].get_audio_codes(0),
        form=form,
        reference_turn=reference_turn,
        tokenizer=rules.tokenizer,
        layout=rules.layout,
    )
    assert torch.equal(built.sample.input_ids, trained.sample.input_ids)
    assert torch.equal(built.sample.audio_ids_concat, trained.sample.audio_ids_concat)
    assert torch.equal(built.sample.audio_ids_start, trained.sample.audio_ids_start)


@pytest.mark.parametrize(
    ("form", "request_and_answer"),
    [
        ("as_is", ["Please generate speech for: Say this.<|eot_id|>", "Say this.<|audio_out_bos|>"]),
        ("boson", ["Say this.<|eot_id|>", "<|audio_out_bos|>"]),
    ],
)
def test_a_reference_in_an_assistant_turn(dataset, rules, form, request_and_answer: list[str]):
    codes = dataset[0].get_audio_codes(0)
    prompt = build_voice_prompt(
        "Say this.",
        reference_text="Heard that.",
        reference_codes=codes,
        form=form,
        reference_turn="assistant",
        tokenizer=rules.tokenizer,
        layout=rules.layout,
    )
    text = rules.tokenizer.decode(prompt.sample.input_ids)
    turns = [turn.split("<|end_header_id|>\n\n")[1] for turn in text.split("<|start_header_id|>")[1:]]
    heard = ["Heard that.<|eot_id|>", "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"]
    assert turns[1:] == heard + request_and_answer
    inputs = collate_prompt(prompt, BatchCollator(rules.layout))
    assert inputs["audio_out_ids"].shape[1] == codes.shape[1] + 9
    assert torch.equal(prompt.reference_codes, codes)


def test_a_text_without_a_reference(rules: SampleRules):
    prompt = build_voice_prompt(
        "Say this.",
        reference_text=None,
        reference_codes=None,
        form="as_is",
        tokenizer=rules.tokenizer,
        layout=rules.layout,
    )
    assert prompt.reference_codes is None
    assert prompt.sample.audio_ids_concat.shape == (8, 0)
    assert collate_prompt(prompt, BatchCollator(rules.layout))["audio_in_ids"].shape == (8, 0)


@pytest.mark.parametrize(
    ("assistant", "text"),
    [
        ([{"type": "text", "text": "said"}, {"type": "audio", "audio_url": "a"}], "said"),
        ([{"type": "audio", "audio_url": "a"}], "asked"),
        ({"type": "audio", "audio_url": "a"}, "asked"),
        ("said", "said"),
    ],
)
def test_the_text_that_a_sample_speaks(assistant, text: str):
    user = [{"type": "text", "text": "heard"}, {"type": "audio", "audio_url": "r"}, {"type": "text", "text": "asked"}]
    messages = [
        {"role": "system", "content": "system"},
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]
    assert spoken_text({"messages": messages}) == text
