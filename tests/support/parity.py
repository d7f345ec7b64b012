"""One global batch, split in every way, trained by DeepSpeed and by plain torch."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_higgs.batch import IGNORE_INDEX, Batch, Labels, ModelInputs
from ds_higgs.config import Config
from ds_higgs.layout import ExpandedSequence, expand
from ds_higgs.losses import LossWeights, build_targets
from ds_higgs.model.loading import HiggsAudioConfig, load_tokenizer, read_model_config
from ds_higgs.model.split_weights import gathered
from ds_higgs.training.engine import build_trained_model
from ds_higgs.training.keep_base import KeptBase
from ds_higgs.training.memory_plan import choose_memory_settings
from ds_higgs.training.step_module import StepModule
from ds_higgs.training.stop_and_onset import Landmarks
from tests.support.batches import Sample, make_batch

# The even ones go to rank 0 of 2, the odd ones to rank 1.
WITH_AUDIO = [
    Sample("one two three", (5,), (9,)),
    Sample("a", (3,), (4, 2)),
    Sample("مرحبا", (2,), (14,)),
    Sample("a longer sentence to speak", (4, 3), (6,)),
    Sample("x y z", (), (5,)),
    Sample("نعم", (6,), (8,)),
    Sample("again", (1,), (3,)),
    Sample("the last", (2,), (11,)),
]
# Rank 1 gets no audio at all, and rank 0 one sample without text targets worth mentioning.
RANK_1_WITHOUT_AUDIO = [
    sample if index % 2 == 0 else Sample(sample.text, (), ()) for index, sample in enumerate(WITH_AUDIO)
]
# Rank 0 has three chunks of text targets (`losses.TEXT_CHUNK_ROWS`) in a micro-batch, rank 1 a part of one.
LONG_TEXTS = [
    Sample("a word and more " * 20, (3,), (5,)),
    Sample("b", (2,), (4,)),
    Sample("this one goes on " * 22, (2,), (3,)),
    Sample("short", (1,), (6,)),
]
SCENARIOS = {"all audio": WITH_AUDIO, "rank 1 without audio": RANK_1_WITHOUT_AUDIO, "long texts": LONG_TEXTS}
STEPS = 2
# A weight at which it is a good part of the gradient.
KEPT = KeptBase(weight=20.0, text=True, audio=True, sources=None, codebooks=(0.125,) * 8)
# Of averages that no loss depends on.
LANDMARKS = Landmarks(stream_eos=1025, onset_frames=25, delay=1, audio_start=0, ends=())
# How far two fp32 computations of one loss or gradient norm may lie apart, relatively. Each is the end of a chain of
# some 250 operations (at most 4 layers, about 30 in the forward and 30 in the backward pass of each) that round by at
# most 2^-24, independently: sqrt(250) x 2^-24 = 1e-6. Weights come from at most 3 updates that carry the same error,
# and Adam's large epsilon keeps it from growing: 4 x 1e-6. Seen: at most 3e-7, between any two instruction sets.
# With a small epsilon Adam's first updates are lr x sign(gradient), and what is rounding becomes a step.
ROUNDING = 4e-6


_OPTIM = {"learning_rate": 1e-2, "eps": 1e-2, "schedule": "constant", "max_grad_norm": 0.5}


def parity_config(
    base: Path,
    *,
    train: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    keep: bool = False,
    stage: int = 2,
    **zero: Any,
) -> Config:
    """Dropout off, every kind of trainable module on; Adam with a large epsilon, so that updates are smooth."""
    every_lora = {"rank": 4, "dropout": 0.0, "modules_to_save": ("audio_head", "audio_embeddings"), **(lora or {})}
    return Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"base": str(base)},
            "data": {"train_manifest": "unused"},
            **({"train": train} if train else {"lora": every_lora}),
            "optim": {
                "learning_rate": 1e-2,
                "eps": 1e-2,
                "schedule": "constant",
                "max_grad_norm": 0.5,
                **(optim or {}),
            },
            **({"loss": {"keep_base": {"weight": KEPT.weight}}} if keep else {}),
            "zero": {"stage": stage, "precision": "fp32", **zero},
            "logging": {"tensorboard": False},
        }
    )


def build_model(config: Config, *, split_by: dict[str, Any] | None = None) -> nn.Module:
    """The model with nothing of LoRA left at zero, so that every weight has a gradient."""
    settings = choose_memory_settings(config, device_type="cpu")
    model = build_trained_model(config, Path(config.model.base), settings, split_by=split_by)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


@cache
def micro_batches(base: Path, scenario: str, *, count: int) -> list[Batch]:
    """The scenario's samples as `count` micro-batches: of an even count, number m holds samples of rank m % 2 alone."""
    samples = SCENARIOS[scenario]
    tokenizer, config = load_tokenizer(base), read_model_config(base)
    single = [make_batch([sample], tokenizer, config, seed=i) for i, sample in enumerate(samples)]
    return [_join(single[number::count], config) for number in range(count)]


def _join(batches: list[Batch], config: HiggsAudioConfig) -> Batch:
    """One batch of several of one sample each, as the collator lays it out (padding on the right) and expands it."""
    width = max(batch.labels.text.shape[1] for batch in batches)

    def pad(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

    def frames(name: str) -> list[torch.Tensor]:
        return [b.model_inputs[name] for b in batches if b.model_inputs[name].numel()]

    inputs: dict[str, torch.Tensor] = {
        "input_ids": torch.cat([pad(b.model_inputs["input_ids"], 0) for b in batches]),
        "attention_mask": torch.cat([pad(b.model_inputs["attention_mask"], 0) for b in batches]),
    }
    for kind in ("audio_in", "audio_out"):
        codes = frames(f"{kind}_ids")
        inputs[f"{kind}_ids"] = torch.cat(codes, dim=1) if codes else torch.zeros(8, 0, dtype=torch.long)
        starts, offset = [], 0
        for batch in batches:
            if batch.model_inputs[f"{kind}_ids"].numel():
                starts.append(batch.model_inputs[f"{kind}_ids_start"] + offset)
                offset += batch.model_inputs[f"{kind}_ids"].shape[1]
        inputs[f"{kind}_ids_start"] = torch.cat(starts) if starts else torch.zeros(0, dtype=torch.long)
    return Batch(
        model_inputs=ModelInputs(expanded=_expand(inputs, config), **inputs),
        labels=Labels(
            text=torch.cat([pad(b.labels.text, IGNORE_INDEX) for b in batches]),
            audio=torch.cat([b.labels.audio for b in batches], dim=1),
        ),
        sample_ids=tuple(name for b in batches for name in b.sample_ids),
        num_tokens=sum(b.num_tokens for b in batches),
    )


def _expand(inputs: dict[str, torch.Tensor], config: HiggsAudioConfig) -> ExpandedSequence:
    def lengths(kind: str) -> torch.Tensor:
        ends = inputs[f"{kind}_ids"].new_tensor([inputs[f"{kind}_ids"].shape[1]])
        return torch.cat([inputs[f"{kind}_ids_start"], ends]).diff()

    return expand(
        inputs["input_ids"],
        inputs["attention_mask"],
        audio_in_lengths=lengths("audio_in"),
        audio_out_lengths=lengths("audio_out"),
        placeholder_ids=(config.audio_in_token_idx, config.audio_out_token_idx),
        pad_id=config.pad_token_id,
    )


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole, also where they are split."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                found[name] = parameter.detach().clone()
    return found


def add_gradients(
    module: StepModule, batches: list[Batch], masters: dict[str, torch.Tensor], keep: KeptBase | None = None
) -> float:
    """Set the masters' gradients to the sum over `batches`, in fp32; return the loss."""
    weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)
    targets = [build_targets(batch, placeholder_ids=module.placeholder_ids) for batch in batches]
    counts = sum(one.counts() for one in targets)
    scales = weights.scales(counts).float()
    kept_scales = None if keep is None else keep.scales(counts.unsqueeze(0), times=1.0)
    parameters = dict(module.peft_model.named_parameters())
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    total = 0.0
    for batch, one in zip(batches, targets, strict=True):
        loss = module(batch.model_inputs, one, scales, kept_scales).loss
        loss.backward()
        total += loss.item()
        for name, master in masters.items():
            if parameters[name].grad is not None:
                master.grad += parameters[name].grad
                parameters[name].grad = None
    return total
