"""Batches of odd shapes, made by boson's own collator, and the gradients that they give."""

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel

from ds_higgs.batch import ModelInputs
from ds_higgs.model.loading import load_model, read_model_config
from ds_higgs.model.lora import apply_lora
from tests.support.batches import build_collator
from tests.support.norms import randomise_norms

# A sample is a list of parts: a number of text tokens, ("in", frames) or ("out", frames).
Part = int | tuple[str, int]

BATCHES: dict[str, list[list[Part]]] = {
    "one_left_padded": [[13, ("in", 5), 4, ("out", 9), 3]],
    "one_of_a_whole_block": [[5, ("out", 2)]],  # 5 + 2 frames + 2 specials + 7 of the delay pattern = 16
    "unequal_lengths": [[21, ("in", 11), 3, ("out", 6), 2], [4, ("out", 17), 1], [30]],
    "several_segments": [[3, ("out", 4), 2, ("in", 3), 1, ("out", 7)], [2, ("in", 1), ("in", 2), 5, ("out", 1)]],
    "no_audio": [[9], [22]],
    "no_audio_one_sample": [[11]],
    "only_audio": [[("out", 5)], [("out", 12)]],
    "audio_in_without_audio_out": [[6, ("in", 8), 2], [3]],
}


def make_inputs(config, samples: list[list[Part]], seed: int = 0) -> ModelInputs:
    generator = torch.Generator().manual_seed(seed)
    collated = build_collator(config)([_make_sample(config, parts, generator) for parts in samples])
    names = ("input_ids", "attention_mask", "audio_in_ids", "audio_in_ids_start", "audio_out_ids")
    names += ("audio_out_ids_start", "audio_out_ids_start_group_loc")
    return ModelInputs(**{name: getattr(collated, name) for name in names})


def _make_sample(config, parts: list[Part], generator: torch.Generator) -> ChatMLDatasetSample:
    ids: list[int] = []
    codes = [torch.empty(config.audio_num_codebooks, 0, dtype=torch.long)]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 256, (part,), generator=generator).tolist()
        else:
            ids.append(config.audio_in_token_idx if part[0] == "in" else config.audio_out_token_idx)
            codes.append(torch.randint(0, 1024, (config.audio_num_codebooks, part[1]), generator=generator))
    starts = torch.tensor([0] + [code.shape[1] for code in codes[1:-1]]).cumsum(0)[: len(codes) - 1]
    return ChatMLDatasetSample(
        input_ids=torch.tensor(ids),
        label_ids=torch.tensor(ids),
        audio_ids_concat=torch.cat(codes, dim=1),
        audio_ids_start=starts,
        audio_waveforms_concat=torch.tensor([]),
        audio_waveforms_start=torch.tensor([]),
        audio_sample_rate=torch.tensor([]),
        audio_speaker_indices=torch.tensor([]),
    )


@pytest.fixture(scope="session")
def tiny_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base checkpoint with other norm weights for text than for audio; read only."""
    folder = tmp_path_factory.mktemp("uneven_norms") / "base"
    shutil.copytree(tiny_base, folder)
    randomise_norms(folder)
    return folder


@pytest.fixture(params=BATCHES)
def odd_inputs(request: pytest.FixtureRequest, tiny_base: Path) -> ModelInputs:
    """Every batch of BATCHES in turn, or those that a test asks for by `indirect` parameters."""
    return make_inputs(read_model_config(tiny_base), BATCHES[request.param])


@pytest.fixture(scope="session")
def lora_model(tiny_base: Path) -> Callable[..., PeftModel]:
    """A factory of fp32 LoRA models whose LoRA B is not zero; every call gives a new one with equal weights.

    whole: parts that are trained whole in place of LoRA.
    """

    @functools.cache
    def make(dropout: float, whole: tuple[str, ...]) -> PeftModel:
        model = apply_lora(
            load_model(tiny_base, dtype=torch.float32),
            rank=4,
            alpha=8,
            dropout=dropout,
            targets=[path for path in ("attention", "text_ffn", "audio_ffn") if path not in whole],
            modules_to_save=("audio_embeddings", *whole),
        )
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return lambda dropout=0.0, whole=(): copy.deepcopy(make(dropout, whole))


@pytest.fixture
def loss_and_grads() -> Callable[[HiggsAudioModel, ModelInputs], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """A loss over all logits that are not padding's, and the gradients of what is trained."""

    def run(model: HiggsAudioModel, inputs: ModelInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(3)  # of dropout
        outputs = model(**inputs, use_cache=False)
        text = outputs.logits[outputs.attention_mask.bool()]
        loss = text.logsumexp(-1).square().mean() + outputs.audio_logits.logsumexp(-1).square().sum() / 50
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        return loss.detach(), grads

    return run
