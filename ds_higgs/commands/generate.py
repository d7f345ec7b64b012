"""Speaks a text, or a whole manifest, with a base checkpoint and an adapter, to WAV files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_higgs.commands.export import open_adapter
from ds_higgs.data.rules import ReferenceTurn
from ds_higgs.errors import UserError
from ds_higgs.model.generation import GeneratedCodes, Sampling, generate_codes, max_frames_for
from ds_higgs.model.loading import resolve_base
from ds_higgs.speech.prompts import Prompt, build_voice_prompt, collate_prompt
from ds_higgs.speech.samples import Speaker, choose_prompts, save_wav, speak_all
from ds_higgs.speech.voice import Voice

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class VoiceOptions:
    """Which model speaks.

    base: folder or hub id; None: the one that the adapter names.
    base_of: instead of `base`: the base that this adapter names, without the adapter.
    step: of a run, for `adapter` and `base_of`.
    reference_turn: `data.reference_turn`; None: that of the run that the adapter comes from, else as_is.
    """

    base: str | None = None
    base_of: Path | None = None
    revision: str | None = None
    adapter: Path | None = None
    step: int | None = None
    codec: str | None = None
    device: str | None = None
    precision: str | None = None
    reference_turn: ReferenceTurn | None = None


@dataclass(frozen=True)
class SpeechOptions:
    """How it speaks."""

    sampling: Sampling
    seed: int = 0
    max_seconds: float = 30.0


@dataclass(frozen=True)
class Reference:
    """The voice to speak in. turn: see `build_voice_prompt`; None: as the adapter was trained, as far as is known."""

    audio: Path | None = None
    text: str | None = None
    turn: str | None = None


def load_voice(options: VoiceOptions) -> Voice:
    """Load the model that `options` names; manifests are read as in the run that its adapter comes from.

    Raises:
        UserError: for what is missing or does not fit.
    """
    source = options.adapter or options.base_of
    if source is None:
        if options.base is None:
            raise UserError("no model: expected --base, or --adapter with an adapter that names its base")
        return _load(options, options.base, options.revision, None, {})
    with open_adapter(source, step=options.step, base=options.base) as opened:
        folder = opened.folder if options.adapter else None
        data = opened.run.config.get("data", {}) if opened.run else {}
        return _load(options, opened.base, options.revision or opened.revision, folder, data)


def _load(
    options: VoiceOptions, base: str, revision: str | None, adapter: Path | None, data: Mapping[str, Any]
) -> Voice:
    audio_root = data.get("audio_root")
    return Voice.load(
        resolve_base(base, revision),
        adapter,
        codec=options.codec or data.get("codec"),
        audio_root=None if audio_root is None else Path(audio_root),
        reference_turn=options.reference_turn or data.get("reference_turn", "as_is"),
        device=options.device,
        dtype=None if options.precision is None else DTYPES[options.precision],
    )


def speak_text(text: str, out: Path, *, voice: Voice, reference: Reference, speech: SpeechOptions) -> GeneratedCodes:
    """Speak `text` in the voice of `reference` to the WAV file `out`; return the codes and what ended them.

    Raises:
        UserError: for a reference that cannot be used, and where nothing was said before the end.
    """
    prompt = build_prompt(text, voice=voice, reference=reference)
    spoken = generate_codes(
        voice.model,
        collate_prompt(prompt, voice.collator),
        max_frames=max_frames_for(
            speech.max_seconds, sampling_rate=voice.codec.sampling_rate, hop_length=voice.codec.hop_length
        ),
        sampling=speech.sampling,
        seed=speech.seed,
    )
    if spoken.codes.shape[1] == 0:
        raise UserError(f"the model ended its speech at once (seed {speech.seed}); nothing was written")
    save_wav(out, voice.codec.decode(spoken.codes), voice.codec)
    return spoken


def build_prompt(text: str, *, voice: Voice, reference: Reference) -> Prompt:
    """The prompt for `text`, as a training sample of the same layout begins."""
    if not text.strip():
        raise UserError("the text to speak is empty")
    turn = reference.turn or ("assistant" if voice.rules.reference_turn == "assistant" else "user")
    if reference.audio is not None and turn != "user" and not reference.text:
        raise UserError(f"--reference-text is missing: with --reference-turn {turn} it is the message before the audio")
    return build_voice_prompt(
        text,
        reference_text=reference.text,
        reference_codes=None if reference.audio is None else voice.encode(reference.audio),
        reference_turn=turn,
        tokenizer=voice.rules.tokenizer,
        layout=voice.rules.layout,
    )


def speak_manifest(
    manifest: Path, out: Path, *, voice: Voice, speech: SpeechOptions, count: int | None, cache_dir: Path | None = None
) -> list[dict]:
    """Speak up to `count` samples of a manifest (None: all) to `out`/NNN.wav, their measures to samples.jsonl.

    Target and reference of each, as the codec gives them back, go to `out`/target and `out`/reference.
    """
    items = choose_prompts(voice.read_manifest(manifest, cache_dir=cache_dir), voice.collator, count=count)
    if not items:
        raise UserError(f"{manifest}: no sample has assistant audio to speak")
    speaker = Speaker(
        voice.codec, voice.collator, sampling=speech.sampling, seed=speech.seed, max_seconds=speech.max_seconds
    )
    speaker.save_originals(out, items)
    rows = speak_all(voice.model, items, speaker, out)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return rows
