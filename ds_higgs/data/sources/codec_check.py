"""Whether codes that somebody else has made are this codec's: a few clips are encoded again."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ds_higgs.data.audio import Segment, decode
from ds_higgs.data.code_names import holds_codes
from ds_higgs.data.codec.source import AudioCodec, CodecSource
from ds_higgs.data.codes import codec_name, read_codes
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.sources.utterance import Utterance
from ds_higgs.errors import UserError

logger = logging.getLogger("ds_higgs")

NUM_CLIPS = 8
# Of equal codes. Another device, rounding, resampler or loudness changes some codes, of the later codebooks above all;
# with another codec one in 1024 is equal by chance.
LEAST_AGREEMENT = 0.3
PEAKS = (None, 0.9)  # recordings are encoded as they are, or scaled to a peak, as OmniVoice scales them


def name_codec(
    source: Path, utterances: Sequence[Utterance], codec: CodecSource, *, trust: bool, device: str = "cpu"
) -> list[Utterance]:
    """The utterances, those of codes with their codec's name.

    Args:
        trust: take the codes for this codec's, whatever they are.

    Raises:
        UserError: they are another codec's, or no recording is at hand to tell, and `trust` is not set.
    """
    named = [replace(one, codec=codec_name(codec)) if holds_codes(one.audio) else one for one in utterances]
    if not trust and any(one.codec for one in named):
        _check(source, [one for one in named if one.codec and one.recording and one.recording.is_file()], codec, device)
    return named


def _check(source: Path, heard: Sequence[Utterance], codec: CodecSource, device: str) -> None:
    if not heard:
        raise UserError(
            f"{source}: codes, and none of the recordings that they were made of is here, so nobody can tell whether "
            f"they are those of {codec.folder}; expected recordings where the shards name them (`audio_path`), or "
            "--trust-codec"
        )
    chosen = [heard[place] for place in np.unique(np.linspace(0, len(heard) - 1, NUM_CLIPS).round().astype(int))]
    loaded = codec.load(device)
    agreement = float(np.mean([_agreement(one, codec, loaded) for one in chosen]))
    if agreement < LEAST_AGREEMENT:
        raise UserError(
            f"{source}: {agreement:.1%} of the codes of {len(chosen)} clips are what {codec.folder} makes of their "
            f"recordings; expected {LEAST_AGREEMENT:.0%} at least: they are another codec's (--codec)"
        )
    logger.info("%s: %.1f %% of the codes of %d clips, encoded again, are equal", source, 100 * agreement, len(chosen))


def _agreement(utterance: Utterance, codec: CodecSource, loaded: AudioCodec) -> float:
    """The share of codes that are equal; 0 where the lengths differ by more than a frame."""
    assert utterance.recording is not None
    try:
        codes = read_codes(utterance.audio, codec)
        waveform = decode(utterance.recording, Segment(), sampling_rate=codec.sampling_rate)
    except BadSampleError as error:
        raise UserError(f"{utterance.place}: {error}") from None
    loudest = float(np.abs(waveform).max())
    scaled = [waveform if peak is None else waveform * (peak / loudest) for peak in PEAKS]
    shares = [0.0]
    for again in loaded.encode(scaled):
        length = min(codes.shape[1], again.shape[1])
        if max(codes.shape[1], again.shape[1]) - length <= 1:
            shares.append(float((codes[:, :length] == again.numpy()[:, :length]).mean()))
    return max(shares)
