"""Codes that were made elsewhere, in place of audio: NumPy arrays [codebooks, frames], named as `code_names` says."""

import io
from pathlib import Path

import numpy as np
from boson_multimodal.data_types import AudioContent, ChatMLSample

from ds_higgs.data.audio import AudioLimits, Segment
from ds_higgs.data.code_names import CODEC_KEY, holds_codes
from ds_higgs.data.codec.source import CodecSource
from ds_higgs.data.containers.opening import open_audio
from ds_higgs.data.problems import BadSampleError


def codec_name(codec: CodecSource) -> str:
    """As manifests name the codec that their codes are of."""
    return codec.identity[:16]


def check_made_by(sample: ChatMLSample, codec: CodecSource) -> None:
    """Raises BadSampleError where a sample's codes are not said to be of this codec."""
    items = [item for message in sample.messages for item in message.content if isinstance(item, AudioContent)]
    named = (sample.misc or {}).get(CODEC_KEY)
    if any(holds_codes(item.audio_url) for item in items) and named != codec_name(codec):
        raise BadSampleError(
            f"codes of the codec {named}" if named else "codes, and not of which codec (`misc.codec`)",
            f"those of {codec_name(codec)}, this run's; `ds-higgs manifest --codec` checks and names it",
        )


def check_codes(path: Path, segment: Segment, limits: AudioLimits, codec: CodecSource) -> float:
    """The length in seconds of the audio that codes stand for.

    Raises:
        BadSampleError: they are no codes of this codec's form, a part of them is asked for, or the length is outside
            `limits`.
    """
    if segment != Segment():
        raise BadSampleError("`offset` or `duration` of codes", "whole clips")
    seconds = read_codes(path, codec).shape[1] * codec.hop_length / codec.sampling_rate
    limits.check(seconds)
    return seconds


def read_codes(path: Path, codec: CodecSource) -> np.ndarray:
    """[codebooks, frames] int16.

    Raises:
        BadSampleError: they cannot be read, or are no codes of this codec's form.
    """
    expected = f"whole numbers [{codec.num_codebooks}, frames] from 0 to {codec.codebook_size - 1}"
    codes = load_array(path)
    found = f"codes {codes.dtype} {list(codes.shape)}"
    if codes.ndim != 2 or len(codes) != codec.num_codebooks or codes.dtype.kind not in "iu" or not codes.shape[1]:
        raise BadSampleError(found, expected)
    if codes.min() < 0 or codes.max() >= codec.codebook_size:
        raise BadSampleError(f"{found} from {codes.min()} to {codes.max()}", expected)
    return codes.astype(np.int16)


def load_array(path: Path) -> np.ndarray:
    """The array, whatever it holds; raises BadSampleError where it cannot be read."""
    try:
        with open_audio(path) as file:
            return np.load(io.BytesIO(file.read()), allow_pickle=False)
    except BadSampleError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise BadSampleError(f"the codes cannot be read: {error}", "a NumPy array") from None
