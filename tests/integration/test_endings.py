"""How speech ends, on a model that was over-fitted: what is planted in its data is seen by name.

In the form that servers send, two utterances at once: one as it is, the other without an end token and with a tail that
goes in circles.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample

from ds_higgs.batch import IGNORE_INDEX, Batch, Labels
from ds_higgs.data.build import build_dataset
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.prompts import collate_prompt, cut_prompt
from ds_higgs.data.rules import SampleRules, build_rules
from ds_higgs.losses import LossWeights
from ds_higgs.model.generation import GREEDY, GeneratedCodes, generate_codes
from ds_higgs.model.loading import load_tokenizer, read_model_config
from ds_higgs.speech.endings import judge_ending
from ds_higgs.training.step_module import StepModule
from ds_higgs.training.stop_and_onset import Landmarks, StopAndOnset, describe_ends
from ds_higgs.training.validation import sum_scores, summarise_scores
from tests.integration.test_overfit import build_module, overfit

CIRCLE, FRAMES = 8, 24  # the tail that is repeated, and the whole utterance as it is


@pytest.fixture(scope="module")
def rules(tiny_base: Path, example_dir: Path) -> SampleRules:
    return build_rules(
        tokenizer=load_tokenizer(tiny_base),
        model_config=read_model_config(tiny_base),
        codec=find_codec(None, tiny_base),
        audio_root=example_dir,
        prompt_form="boson",
    )


@pytest.fixture(scope="module")
def samples(rules: SampleRules, example_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """The utterance as it is, and the other with its tail in circles."""
    folder = tmp_path_factory.mktemp("endings")
    chosen = json.loads((example_dir / "train.json").read_text(encoding="utf-8"))[:2]
    (folder / "two.json").write_text(json.dumps(chosen), encoding="utf-8")
    dataset = build_dataset(folder / "two.json", rules=rules, cache_dir=folder / "codes")
    tail = target_of(dataset[1])[:, CIRCLE : 2 * CIRCLE]
    good = with_target(dataset[0], target_of(dataset[0])[:, :FRAMES])
    return good, with_target(dataset[1], torch.cat([target_of(dataset[1])[:, :CIRCLE], *[tail] * 4], dim=1))


@pytest.fixture(scope="module")
def overfitted(tiny_base: Path, rules: SampleRules, samples) -> StepModule:
    module = build_module(tiny_base)
    good, circling = (collate(rules, sample) for sample in samples)
    batch = BatchCollator(rules.layout)(samples, ["good", "circling"])
    ends = torch.cat([good.labels.audio, without_end(circling, rules).labels.audio], dim=1)
    overfit(module, replace(batch, labels=Labels(batch.labels.text, ends)), steps=60)
    return module.eval()


def target_of(sample: ChatMLDatasetSample) -> torch.Tensor:
    return sample.get_audio_codes(len(sample.audio_ids_start) - 1)


def with_target(sample: ChatMLDatasetSample, codes: torch.Tensor) -> ChatMLDatasetSample:
    before = sample.audio_ids_concat[:, : int(sample.audio_ids_start[-1])]
    return replace(sample, audio_ids_concat=torch.cat([before, codes], dim=1))


def collate(rules: SampleRules, sample: ChatMLDatasetSample) -> Batch:
    return BatchCollator(rules.layout)([sample], ["one"])


def without_end(batch: Batch, rules: SampleRules) -> Batch:
    audio = batch.labels.audio
    return replace(batch, labels=Labels(batch.labels.text, audio.where(audio != rules.layout.stream_eos, IGNORE_INDEX)))


def validate(module: StepModule, batch: Batch, rules: SampleRules) -> StopAndOnset:
    totals = sum_scores(
        module,
        [batch],
        num_codebooks=8,
        placeholder_ids=module.placeholder_ids,
        device=torch.device("cpu"),
        landmarks=Landmarks.of(rules),
    )
    return summarise_scores(totals, LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)).ends


def speak(module: StepModule, sample: ChatMLDatasetSample, rules: SampleRules) -> GeneratedCodes:
    prompt = cut_prompt(sample, rules.layout)
    inputs = collate_prompt(prompt, BatchCollator(rules.layout))
    return generate_codes(module.higgs, inputs, max_frames=100, sampling=GREEDY, seed=0)


def test_the_served_prompt_is_answered_code_by_code(overfitted, rules, samples):
    target = target_of(samples[0])
    spoken = speak(overfitted, samples[0], rules)
    assert spoken.stopped_by == "eos"
    assert torch.equal(spoken.codes, target)
    found = judge_ending(spoken.codes, target, stopped_by="eos")
    assert (found.ending, found.repeats) == ("in_time", False)
    ends = validate(overfitted, collate(rules, samples[0]), rules)
    assert ends.num_ends == 1
    assert ends.eos_probability > 0.9
    assert ends.false_eos_rate == 0
    assert ends.onset_audio_loss < 0.1
    # Nothing is said but the audio, and text was not learned here.
    assert (ends.words_loss, ends.later_audio_loss) == (None, None)
    assert min(ends.audio_start_loss, ends.end_tokens_loss) > 1


def test_a_shifted_end_is_seen_in_validation(overfitted, rules, samples):
    early = with_target(samples[0], target_of(samples[0])[:, :-6])
    assert validate(overfitted, collate(rules, early), rules).eos_probability < 0.1
    late = with_target(samples[0], torch.cat([target_of(samples[0]), target_of(samples[0])[:, :6]], dim=1))
    found = validate(overfitted, collate(rules, late), rules)
    assert found.false_eos_rate > 0
    assert found.eos_probability < 0.9


def test_a_missing_end_token_is_seen_in_validation(overfitted, rules, samples):
    """In the data that is validated on, and in the data that was trained on."""
    good = collate(rules, samples[0])
    none = validate(overfitted, without_end(good, rules), rules)
    assert (none.num_ends, none.eos_probability) == (0, None)
    assert "no end" in describe_ends(vars(none))
    assert validate(overfitted, collate(rules, samples[1]), rules).eos_probability < 0.1


def test_a_repeated_tail_without_end_is_seen_in_speech(overfitted, rules, samples):
    spoken = speak(overfitted, samples[1], rules)
    found = judge_ending(spoken.codes, target_of(samples[0]), stopped_by=spoken.stopped_by)
    assert (found.ending, found.repeats) == ("never", True)
