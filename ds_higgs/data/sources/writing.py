"""Utterances written as a manifest of ChatML samples."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_higgs.data.code_names import CODEC_KEY
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.prompt_forms import PromptForm, VoiceRequest, write_sample
from ds_higgs.data.sources.good_references import find_good_references
from ds_higgs.data.sources.ownership import sign, unsigned
from ds_higgs.data.sources.splitting import pick_references
from ds_higgs.data.sources.utterance import Utterance, collect
from ds_higgs.errors import UserError
from ds_higgs.files import write_atomically


@dataclass(frozen=True)
class Made:
    """What was written: samples, those among them without a reference, names of the speakers."""

    path: Path
    num_samples: int
    num_without_reference: int
    speakers: frozenset[str]

    @property
    def num_speakers(self) -> int:
        return len(self.speakers)


def write_manifest(
    path: Path, utterances: Sequence[Utterance], *, seed: int, system: str | None, form: PromptForm = "as_is"
) -> Made:
    """Write the utterances as ChatML samples, one JSON line each (.jsonl) or as one array; audio relative to `path`.

    Args:
        system: text of the system message; None: the form's own; "": none.

    Raises:
        UserError: naming every utterance that cannot be written in this form.
    """
    folder = path.parent.resolve()
    picked = pick_references(utterances, seed=seed, good=find_good_references(utterances, seed=seed))
    samples = collect(path, picked, lambda pair: _sample(*pair, folder, system, form), what="utterances")
    path.parent.mkdir(parents=True, exist_ok=True)
    samples[0] |= unsigned()
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    else:
        text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, sign(text.encode()))
    return Made(
        path=path,
        num_samples=len(samples),
        num_without_reference=sum(not _has_reference(sample) for sample in samples),
        speakers=frozenset(utterance.speaker for utterance in utterances if utterance.speaker is not None),
    )


def _sample(
    utterance: Utterance, other: Utterance | None, folder: Path, system: str | None, form: PromptForm
) -> dict[str, Any]:
    fields: dict[str, Any] = {"speaker": utterance.speaker} if utterance.speaker is not None else {}
    if utterance.codec is not None:
        fields["misc"] = {CODEC_KEY: utterance.codec}
    if utterance.messages is not None:  # whole already; `data.prompt_form` gives it another form while reading
        return {"messages": [_relative(message, folder) for message in utterance.messages], **fields}
    reference, said = utterance.reference, utterance.reference_text
    if other is not None:
        reference, said = other.audio, other.text
    request = VoiceRequest(
        utterance.text,
        target=_audio_item(folder, utterance.audio),
        reference=None if reference is None else _audio_item(folder, reference),
        reference_text=said,
    )
    try:
        return {**write_sample(request, form, system=system), **fields}
    except BadSampleError as error:
        raise UserError(f"{utterance.place}: {error}; expected {error.expected}") from None


def _audio_item(folder: Path, path: Path) -> dict[str, str]:
    return {"type": "audio", "audio_url": _path_from(folder, path)}


def _relative(message: dict, folder: Path) -> dict:
    content = [
        {**item, "audio_url": _path_from(folder, Path(item["audio_url"]))} if item["type"] == "audio" else item
        for item in message["content"]
    ]
    return {**message, "content": content}


def _path_from(folder: Path, path: Path) -> str:
    """Relative, so that manifest and audio can be moved together; absolute where they share nothing but the root."""
    if Path(os.path.commonpath([folder, path])) == Path(path.anchor):
        return str(path)
    return Path(os.path.relpath(path, folder)).as_posix()


def _has_reference(sample: dict) -> bool:
    """Audio beside the one that is learned."""
    contents = [message["content"] for message in sample["messages"] if not isinstance(message["content"], str)]
    return sum(item["type"] == "audio" for content in contents for item in content) > 1
