"""`ds-higgs rehearse`: the base speaks texts in voices of its own, a source of a mixture that keeps what it can do.

What is spoken goes to OUT/audio as WAV, and its very codes into the code cache, so that training on OUT/replay.jsonl
learns exactly what the base said. Every text is written down once it is spoken: a rehearsal that was stopped goes on.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_higgs.commands.generate import Reference, SpeechOptions, build_prompt
from ds_higgs.commands.voice import Voice
from ds_higgs.data.cache import CodeCache, clip_key
from ds_higgs.data.clip_files import EncodedClip
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.prompt_forms import VoiceRequest, served_form, write_sample
from ds_higgs.data.prompts import collate_prompt
from ds_higgs.errors import UserError
from ds_higgs.files import (
    append_whole,
    hash_file,
    read_json,
    read_json_lines,
    read_text_lines,
    write_atomically,
    write_json,
)
from ds_higgs.model.generation import generate_codes, max_frames_for
from ds_higgs.speech.samples import save_wav

AT_ONCE = 32  # texts spoken between two writes of codes and rows
MANIFEST = "replay.jsonl"
_ROWS, _IDENTITY = "spoken.jsonl", "rehearsal.json"


@dataclass
class Rehearsal:
    """What has been spoken.

    rows: by the text's number; `file` is None where it was left out, `reason` then says why.
    """

    manifest: Path
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def num_spoken(self) -> int:
        return sum(row["file"] is not None for row in self.rows.values())

    @property
    def hours(self) -> float:
        return sum(row["seconds"] for row in self.rows.values() if row["file"] is not None) / 3600


def rehearse(texts: Sequence[str], out: Path, *, voice: Voice, speech: SpeechOptions, base: str) -> Rehearsal:
    """Speak every text without a reference, each with a seed of its own, and write OUT/replay.jsonl.

    Speech that the model did not end, or of a length that training does not take, is left out.

    Args:
        base: the model's name, for the record.

    Raises:
        UserError: `out` holds another rehearsal.
    """
    _begin(out, {"base": base, "texts": _hash(texts), **asdict(speech), "form": served_form(voice.rules.prompt_form)})
    rehearsal = Rehearsal(out / MANIFEST, {row["number"]: row for row in read_json_lines(out / _ROWS)})
    cache = CodeCache(voice.cache_dir, voice.rules.codec.identity)
    left = [(number, text) for number, text in enumerate(texts) if number not in rehearsal.rows]
    with tqdm(total=len(texts), initial=len(texts) - len(left), unit="text", disable=None) as bar:
        for start in range(0, len(left), AT_ONCE):
            rows: list[dict[str, Any]] = []
            clips: dict[str, EncodedClip] = {}
            for number, text in left[start : start + AT_ONCE]:
                row, clip = _speak(number, text, out, voice=voice, speech=speech)
                rows.append(row)
                clips |= clip
                bar.update()
            if clips:
                cache.add(clips)
            append_whole(out / _ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            rehearsal.rows |= {row["number"]: row for row in rows}
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in _samples(texts, rehearsal, voice)]
    write_atomically(rehearsal.manifest, "".join(lines).encode())
    return rehearsal


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, without blank ones.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    texts = [line.strip() for line in read_text_lines(path) if line.strip()]
    if not texts:
        raise UserError(f"{path}: no text in it; expected one a line")
    return texts


def _begin(out: Path, identity: dict[str, Any]) -> None:
    (out / "audio").mkdir(parents=True, exist_ok=True)
    record = out / _IDENTITY
    if not record.exists():
        write_json(record, identity)
        return
    found = read_json(record)
    changed = [key for key in identity if json.loads(json.dumps(identity[key])) != found.get(key)]
    if changed:
        raise UserError(f"{out}: holds a rehearsal with other {', '.join(changed)}; expected a new folder")


def _speak(
    number: int, text: str, out: Path, *, voice: Voice, speech: SpeechOptions
) -> tuple[dict[str, Any], dict[str, EncodedClip]]:
    """The text's row, and its codes by their key in the code cache (none where it is left out)."""
    codec = voice.codec
    spoken = generate_codes(
        voice.model,
        collate_prompt(build_prompt(text, voice=voice, reference=Reference()), voice.collator),
        max_frames=max_frames_for(speech.max_seconds, sampling_rate=codec.sampling_rate, hop_length=codec.hop_length),
        sampling=speech.sampling,
        seed=speech.seed + number,
    )
    seconds = spoken.codes.shape[1] * codec.hop_length / codec.sampling_rate
    row: dict[str, Any] = {"number": number, "text": text, "seconds": seconds, "file": None}
    try:
        voice.rules.limits.check(seconds)
    except BadSampleError as error:
        return {**row, "reason": error.message}, {}
    if spoken.stopped_by != "eos":
        return {**row, "reason": "the model did not end"}, {}
    file = out / "audio" / f"{number:06d}.wav"
    save_wav(file, codec.decode(spoken.codes), codec)
    content = hash_file(file)
    key = clip_key(content, offset=0.0, duration=None, codec_identity=voice.rules.codec.identity)
    return {**row, "file": str(file.relative_to(out))}, {key: EncodedClip(spoken.codes, seconds, content)}


def _samples(texts: Sequence[str], rehearsal: Rehearsal, voice: Voice) -> Iterator[dict[str, Any]]:
    form = served_form(voice.rules.prompt_form)
    for number in sorted(rehearsal.rows):
        file = rehearsal.rows[number]["file"]
        if file is not None:
            yield write_sample(VoiceRequest(texts[number], target={"type": "audio", "audio_url": file}), form)


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
