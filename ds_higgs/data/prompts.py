"""Prompts for generation, cut out of the very samples that training sees."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from transformers import PreTrainedTokenizerBase

from ds_higgs.batch import IGNORE_INDEX, FixedPrompt, ModelInputs
from ds_higgs.data.chatml import parse_sample, tokenize
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.manifest import read_manifest, sample_id
from ds_higgs.data.prompt_forms import PromptForm, ReferenceTurn, VoiceRequest, take_form, write_sample
from ds_higgs.layout import AudioLayout

# Where codes are given rather than a file.
_STAND_IN = {"type": "audio", "audio_url": "codes"}


@dataclass(frozen=True)
class Prompt:
    """A sample up to the <|audio_out_bos|> of its last audio to learn, and what is to follow.

    target_codes: [codebooks, frames], empty where nothing is known.
    reference_codes: of the last audio before it; None where there is none.
    """

    sample: ChatMLDatasetSample
    target_codes: torch.Tensor
    reference_codes: torch.Tensor | None


def cut_prompt(sample: ChatMLDatasetSample, layout: AudioLayout) -> Prompt | None:
    """Cut a training sample before its last supervised audio; None where it has no such audio."""
    is_audio = (sample.input_ids == layout.audio_in_token) | (sample.input_ids == layout.audio_out_token)
    is_target = (sample.input_ids == layout.audio_out_token) & (sample.label_ids != IGNORE_INDEX)
    targets = is_target.nonzero().flatten()
    if not targets.numel():
        return None
    end = int(targets[-1])
    clip = int(is_audio[:end].sum())
    first_frame = int(sample.audio_ids_start[clip])
    prompt = replace(
        sample,
        input_ids=sample.input_ids[:end],
        label_ids=torch.full((end,), IGNORE_INDEX),
        audio_ids_concat=sample.audio_ids_concat[:, :first_frame],
        audio_ids_start=sample.audio_ids_start[:clip],
        audio_speaker_indices=sample.audio_speaker_indices[:clip],
    )
    reference = sample.get_audio_codes(clip - 1) if clip else None
    return Prompt(prompt, target_codes=sample.get_audio_codes(clip), reference_codes=reference)


def collate_prompt(prompt: Prompt, collator: BatchCollator) -> ModelInputs:
    """The model's inputs for one prompt: collated as in training, less the padding behind it."""
    inputs = dict(collator([prompt.sample], ["prompt"]).model_inputs)
    length = len(prompt.sample.input_ids)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :length]
    return ModelInputs(expanded=None, **inputs)


def choose_prompts(dataset: HiggsDataset, collator: BatchCollator, *, count: int | None) -> list[FixedPrompt]:
    """Up to `count` samples (None: all) that have audio to learn, spread evenly over the data set; always the same."""
    with_audio = np.flatnonzero(dataset.count_target_frames() > 0).tolist()
    count = len(with_audio) if count is None else min(count, len(with_audio))
    places = np.unique(np.linspace(0, len(with_audio) - 1, count).round().astype(int))
    return [_fix_prompt(dataset, collator, with_audio[place], number) for number, place in enumerate(places)]


def choose_prompts_of_all(
    datasets: Sequence[HiggsDataset], collator: BatchCollator, *, count: int, with_texts: bool = False
) -> list[FixedPrompt]:
    """`choose_prompts` from several data sets, as evenly as `count` can be split; those of the first come first.

    Args:
        with_texts: whether each has its text, for which the manifests are read once more.
    """
    found: list[FixedPrompt] = []
    for place, dataset in enumerate(datasets):
        share = -(-(count - len(found)) // (len(datasets) - place))
        chosen = choose_prompts(dataset, collator, count=share)
        chosen = add_texts(chosen, dataset.manifest) if with_texts else chosen
        found += [replace(prompt, number=len(found) + number) for number, prompt in enumerate(chosen)]
    return found


def add_texts(prompts: Sequence[FixedPrompt], manifest: Path) -> list[FixedPrompt]:
    """The prompts, chosen of this manifest's samples, with what each is to say."""
    wanted = {prompt.sample_id for prompt in prompts}
    entries = ((sample_id(manifest, entry.number), entry) for entry in read_manifest(manifest))
    texts = {name: spoken_text(entry.data) for name, entry in entries if name in wanted}
    return [replace(prompt, text=texts[prompt.sample_id]) for prompt in prompts]


def _fix_prompt(dataset: HiggsDataset, collator: BatchCollator, index: int, number: int) -> FixedPrompt:
    sample, sample_id = dataset[index], dataset.sample_id(index)
    prompt = cut_prompt(sample, collator.layout)
    assert prompt is not None, "only samples with audio to learn are chosen"
    return FixedPrompt(
        number,
        sample_id,
        inputs=collate_prompt(prompt, collator),
        batch=collator([sample], [sample_id]),
        target_codes=prompt.target_codes,
        reference_codes=prompt.reference_codes,
    )


def build_voice_prompt(
    text: str,
    *,
    reference_text: str | None,
    reference_codes: torch.Tensor | None,
    form: PromptForm,
    reference_turn: ReferenceTurn = "as_is",
    system: str | None = None,
    tokenizer: PreTrainedTokenizerBase,
    layout: AudioLayout,
) -> Prompt:
    """The prompt that asks for `text` in the voice of a reference (None: in any voice), as training has it.

    Args:
        reference_codes: [codebooks, frames].
        form, reference_turn: `data.prompt_form` and `data.reference_turn`.
        system: text of the system message; None: the form's own; "": none.

    Raises:
        BadSampleError: what the reference says is not known, and the form needs it.
    """
    request = VoiceRequest(
        text,
        target=_STAND_IN,
        reference=None if reference_codes is None else _STAND_IN,
        reference_text=reference_text,
    )
    sample = parse_sample(write_sample(request, form, system=system))
    if form == "as_is":  # a sample that is served already must not lose a phrase that is meant to be spoken
        sample = take_form(sample, form, reference_turn).sample
    tokenized = tokenize(sample, tokenizer, layout)
    input_ids = torch.tensor(tokenized.tokens)
    empty = torch.zeros((layout.num_codebooks, 0), dtype=torch.long)
    codes = [empty] if reference_codes is None else [reference_codes, empty]
    starts = [0] if reference_codes is None else [0, reference_codes.shape[1]]
    prompt = cut_prompt(
        ChatMLDatasetSample(
            input_ids=input_ids,
            label_ids=torch.where(torch.tensor(tokenized.supervised), input_ids, IGNORE_INDEX),
            audio_ids_concat=torch.cat(codes, dim=1),
            audio_ids_start=torch.tensor(starts),
            audio_waveforms_concat=torch.zeros(0),
            audio_waveforms_start=torch.zeros(0, dtype=torch.long),
            audio_sample_rate=torch.zeros(0),
            audio_speaker_indices=torch.full((len(codes),), -1),
        ),
        layout,
    )
    assert prompt is not None, "the last message has supervised audio"
    return prompt


def spoken_text(entry: dict[str, Any]) -> str:
    """What the last assistant message of a checked manifest entry says: its own text, else the last user text."""
    messages = entry["messages"]
    last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    for message in [messages[last], *reversed(messages[:last])]:
        if message["role"] != "system" and (texts := _texts(message["content"])):
            return texts[-1]
    return ""


def _texts(content: Any) -> list[str]:
    items = content if isinstance(content, list) else [content]
    texts = [item if isinstance(item, str) else item.get("text", "") for item in items]
    return [text for text in texts if text]
