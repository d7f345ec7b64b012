"""Prompts for generation, cut out of the very samples that training sees."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from transformers import PreTrainedTokenizerBase

from ds_higgs.batch import IGNORE_INDEX, FixedPrompt, ModelInputs
from ds_higgs.data.chatml import tokenize
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.references import move_references
from ds_higgs.layout import AudioLayout

SYSTEM_PROMPT = "You are a helpful assistant capable of generating speech in the voice of the provided reference audio."
REQUEST = "Please generate speech for: {text}"


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
    with_audio = [index for index in range(len(dataset)) if dataset.count_targets(index)[1] > 0]
    count = len(with_audio) if count is None else min(count, len(with_audio))
    places = np.unique(np.linspace(0, len(with_audio) - 1, count).round().astype(int))
    return [_fix_prompt(dataset, collator, with_audio[place], number) for number, place in enumerate(places)]


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
    reference_turn: str,
    system_prompt: str = SYSTEM_PROMPT,
    tokenizer: PreTrainedTokenizerBase,
    layout: AudioLayout,
) -> Prompt:
    """The prompt that asks for `text` in the voice of a reference (None: in any voice).

    Args:
        reference_codes: [codebooks, frames].
        reference_turn: "user": reference and request in one user message, as in examples/voice_cloning; "assistant":
            the same as `data.reference_turn: assistant` trains it; "boson": as in boson's own examples, the
            reference as an earlier assistant turn, the request the bare text, the answer audio alone.
    """
    messages = _voice_messages(text, reference_text, reference_codes is not None, reference_turn, system_prompt)
    tokenized = tokenize(ChatMLSample(messages=messages), tokenizer, layout)
    input_ids = torch.tensor(tokenized.tokens)
    empty = torch.zeros((layout.num_codebooks, 0), dtype=torch.long)
    codes = [empty] if reference_codes is None else [reference_codes, empty]
    starts = [0] if reference_codes is None else [0, reference_codes.shape[1]]
    sample = ChatMLDatasetSample(
        input_ids=input_ids,
        label_ids=torch.where(torch.tensor(tokenized.supervised), input_ids, IGNORE_INDEX),
        audio_ids_concat=torch.cat(codes, dim=1),
        audio_ids_start=torch.tensor(starts),
        audio_waveforms_concat=torch.zeros(0),
        audio_waveforms_start=torch.zeros(0, dtype=torch.long),
        audio_sample_rate=torch.zeros(0),
        audio_speaker_indices=torch.full((len(codes),), -1),
    )
    prompt = cut_prompt(sample, layout)
    assert prompt is not None, "the last message has supervised audio"
    return prompt


def _voice_messages(
    text: str, reference_text: str | None, has_reference: bool, reference_turn: str, system_prompt: str
) -> list[Message]:
    audio = AudioContent(audio_url="placeholder")
    system = Message("system", [TextContent(system_prompt)])
    heard: list[Any] = [TextContent(reference_text)] if reference_text else []
    if reference_turn == "boson":
        before = [Message("user", heard), Message("assistant", [audio])] if has_reference else []
        return [system, *before, Message("user", [TextContent(text)]), Message("assistant", [audio])]
    if has_reference:
        heard.append(audio)
    user = Message("user", [*heard, TextContent(REQUEST.format(text=text))])
    sample = ChatMLSample(messages=[system, user, Message("assistant", [TextContent(text), audio])])
    return move_references(sample).sample.messages if reference_turn == "assistant" else sample.messages


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
