"""Training and inference agree: an over-fitted utterance is spoken greedily, code by code, until its own EOS.

A loss that is not shifted, a delay pattern on one side only, a prompt collated otherwise than in training, or an EOS
that is not trained: each of them breaks this.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from ds_higgs.batch import Batch
from ds_higgs.data.build import build_dataset
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.prompts import collate_prompt, cut_prompt
from ds_higgs.data.rules import build_rules
from ds_higgs.losses import build_targets, loss_scales
from ds_higgs.model.generation import GREEDY, generate_codes
from ds_higgs.model.loading import load_model, load_tokenizer, read_model_config
from ds_higgs.model.lora import apply_lora
from ds_higgs.speech.accuracy import measure_accuracy
from ds_higgs.training.step_module import StepModule

STEPS, LEARNING_RATE = 150, 1e-2


@pytest.fixture(scope="module")
def one_utterance(tiny_base: Path, example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> HiggsDataset:
    folder = tmp_path_factory.mktemp("overfit")
    samples = json.loads((example_dir / "train.json").read_text(encoding="utf-8"))
    (folder / "one.json").write_text(json.dumps(samples[:1]), encoding="utf-8")
    rules = build_rules(
        tokenizer=load_tokenizer(tiny_base),
        model_config=read_model_config(tiny_base),
        codec=find_codec(None, tiny_base),
        audio_root=example_dir,
    )
    return build_dataset(folder / "one.json", rules=rules, cache_dir=folder / "codes")


def build_module(base: Path) -> StepModule:
    torch.manual_seed(0)
    model = load_model(base, dtype=torch.float32)
    targets = ["attention", "text_ffn", "audio_ffn"]
    return StepModule(
        apply_lora(model, rank=16, alpha=32, dropout=0.0, targets=targets, modules_to_save=["audio_head"])
    )


def overfit(module: StepModule, batch: Batch, *, steps: int = STEPS) -> None:
    targets = build_targets(batch, placeholder_ids=module.placeholder_ids)
    scales = loss_scales(targets.counts(), text_weight=0.0, audio_weight=1.0, codebook_weights=(1 / 8,) * 8).float()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        module(batch.model_inputs, targets, scales).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def test_an_overfitted_utterance_is_spoken_code_by_code(tiny_base: Path, one_utterance: HiggsDataset):
    collator = BatchCollator(one_utterance.layout)
    batch = collator([one_utterance[0]], ["one.json:0"])
    prompt = cut_prompt(one_utterance[0], one_utterance.layout)
    assert prompt is not None
    module = build_module(tiny_base)
    inputs = collate_prompt(prompt, collator)
    speak = partial(generate_codes, module.higgs, inputs, max_frames=200, sampling=GREEDY, seed=0)
    before = speak().codes
    assert before.shape != prompt.target_codes.shape or not torch.equal(before, prompt.target_codes)

    overfit(module, batch)

    spoken = speak()
    assert spoken.stopped_by == "eos"
    assert spoken.codes.shape == prompt.target_codes.shape
    assert torch.equal(spoken.codes, prompt.target_codes)
    assert measure_accuracy(module.eval().higgs, batch).overall() == 1
