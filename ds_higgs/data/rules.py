"""What samples are checked against, from plain settings and the base checkpoint's config."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_higgs.data.audio import AudioLimits
from ds_higgs.data.chatml import TokenizedSample
from ds_higgs.data.clips import Clip
from ds_higgs.data.code_names import holds_codes
from ds_higgs.data.codec.source import CodecSource
from ds_higgs.data.conditions import NO_DROPS, DropRates
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.prompt_forms import PromptForms, ReferenceTurn
from ds_higgs.errors import UserError
from ds_higgs.layout import WHISPER_SECONDS, AudioLayout


@dataclass(frozen=True)
class SampleRules:
    """What a sample is checked against and tokenized with.

    audio_root: what relative audio paths are relative to; None is the manifest's folder.
    max_tokens: the most positions that one sample may take in the model.
    reference_turn: where user messages' reference audio goes; see `references.move_references`.
    prompt_form: how speech is asked for; see `prompt_forms`.
    exclude: names of samples that are left out.
    drops: how often parts of the prompt are left out in training.
    redraw: whether references are redrawn in training.
    audio_here: whether recordings may be looked at; else all has to be known of them, and their codes be there.
    """

    tokenizer: PreTrainedTokenizerBase
    layout: AudioLayout
    codec: CodecSource
    limits: AudioLimits
    max_tokens: int
    audio_root: Path | None = None
    reference_turn: ReferenceTurn = "as_is"
    prompt_form: PromptForms = "as_is"
    exclude: frozenset[str] = frozenset()
    drops: DropRates = NO_DROPS
    redraw: bool = False
    audio_here: bool = True


def build_rules(
    *,
    tokenizer: PreTrainedTokenizerBase,
    model_config: Any,
    codec: CodecSource,
    audio_root: Path | None = None,
    min_audio_s: float = AudioLimits.min_seconds,
    max_audio_s: float = AudioLimits.max_seconds,
    max_tokens: int | None = None,
    use_delay_pattern: bool | None = None,
    encode_whisper_embed: bool | None = None,
    reference_turn: ReferenceTurn = "as_is",
    prompt_form: PromptForms = "as_is",
) -> SampleRules:
    """The rules for a base checkpoint and its codec.

    Args:
        model_config: HiggsAudioConfig of the base checkpoint.
        max_tokens: the token budget of a batch, where there is one: no sample may exceed it.
        use_delay_pattern, encode_whisper_embed: override the base checkpoint's config; None follows it.

    Raises:
        UserError: the codec does not fit the checkpoint, or Whisper features are asked of one without an audio tower.
    """
    layout = AudioLayout.from_config(
        model_config, use_delay_pattern=use_delay_pattern, encode_whisper_embed=encode_whisper_embed
    )
    codec.check_fits(num_codebooks=layout.num_codebooks, codebook_size=layout.codebook_size)
    if layout.whisper and model_config.skip_audio_tower:
        raise UserError(
            "data.encode_whisper_embed: the base checkpoint has no audio tower (skip_audio_tower is true in its "
            "config.json), so it cannot take Whisper features; expected auto or false"
        )
    longest = model_config.text_config.max_position_embeddings
    limits = AudioLimits(min_audio_s, max_audio_s)
    most = min(longest, max_tokens or longest)
    return SampleRules(tokenizer, layout, codec, limits, most, audio_root, reference_turn, prompt_form)


def check_fits(tokenized: TokenizedSample, clips: Sequence[Clip], rules: SampleRules) -> list[BadSampleError]:
    """What is wrong with the sample as a whole, its clips being known."""
    errors = _check_whisper(tokenized, clips, rules.layout) if rules.layout.whisper else []
    seconds = np.asarray([clip.seconds for clip in clips])
    frames = rules.codec.count_frames(seconds)
    positions = rules.layout.count_positions(np.asarray(tokenized.tokens), frames, seconds)
    if positions.sum() > rules.max_tokens:
        expected = f"at most {rules.max_tokens} (the model's positions, or data.max_tokens)"
        errors.append(BadSampleError(f"the sample takes {positions.sum()} positions", expected))
    return errors


def _check_whisper(tokenized: TokenizedSample, clips: Sequence[Clip], layout: AudioLayout) -> list[BadSampleError]:
    """Two forms that boson's collator gets wrong: it would take other audio for the features than for the codes."""
    placeholders = [token for token in tokenized.tokens if token in (layout.audio_in_token, layout.audio_out_token)]
    is_input = [token == layout.audio_in_token for token in placeholders]
    errors = []
    if is_input != sorted(is_input, reverse=True):
        errors.append(BadSampleError("user audio after assistant audio", "user audio first, with Whisper features on"))
    for user_audio, clip in zip(is_input, clips, strict=True):
        if user_audio and holds_codes(clip.path):
            error = BadSampleError("codes without their audio", "audio, with Whisper features on")
            errors.append(error.of(clip.name(learned=False)))
        if user_audio and clip.seconds > WHISPER_SECONDS:
            expected = f"at most {WHISPER_SECONDS} s, with Whisper features on"
            error = BadSampleError(f"{clip.seconds:.1f} s of audio", expected)
            errors.append(error.of(clip.name(learned=False)))
    return errors
