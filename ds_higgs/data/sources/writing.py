"""Utterances written as a manifest of ChatML samples."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_higgs.data.sources.good_references import find_good_references
from ds_higgs.data.sources.ownership import sign, unsigned
from ds_higgs.data.sources.splitting import pick_references
from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.files import write_atomically

SYSTEM_MESSAGE = (
    "You are a helpful assistant capable of generating speech in the voice of the provided reference audio."
)
REQUEST = "Please generate speech for: "


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


def write_manifest(path: Path, utterances: Sequence[Utterance], *, seed: int, system: str) -> Made:
    """Write the utterances as ChatML samples, one JSON line each (.jsonl) or as one array; audio relative to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picked = pick_references(utterances, seed=seed, good=find_good_references(utterances, seed=seed))
    samples = [_sample(utterance, other, path.parent.resolve(), system) for utterance, other in picked]
    samples[0] |= unsigned()
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    else:
        text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, sign(text.encode()))
    return Made(
        path=path,
        num_samples=len(samples),
        num_without_reference=sum(not _has_user_audio(sample) for sample in samples),
        speakers=frozenset(utterance.speaker for utterance in utterances if utterance.speaker is not None),
    )


def _sample(utterance: Utterance, other: Utterance | None, folder: Path, system: str) -> dict[str, Any]:
    if utterance.messages is not None:
        messages = [_relative(message, folder) for message in utterance.messages]
    else:
        reference, said = utterance.reference, utterance.reference_text
        if other is not None:
            reference, said = other.audio, other.text
        user: list[dict] = [{"type": "text", "text": said}] if said else []
        if reference is not None:
            user.append({"type": "audio", "audio_url": _path_from(folder, reference)})
        user.append({"type": "text", "text": REQUEST + utterance.text})
        target = {"type": "audio", "audio_url": _path_from(folder, utterance.audio)}
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": utterance.text}, target]},
        ]
        if system:
            messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages} | ({"speaker": utterance.speaker} if utterance.speaker is not None else {})


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


def _has_user_audio(sample: dict) -> bool:
    users = [message for message in sample["messages"] if message["role"] == "user"]
    return any(item["type"] == "audio" for message in users for item in message["content"])
