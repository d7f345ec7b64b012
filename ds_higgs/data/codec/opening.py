"""Finds and opens the codec that a configuration names. A new kind of codec is added to KINDS, and nowhere else."""

from pathlib import Path

import torch

from ds_higgs import hub
from ds_higgs.data.codec import dac, higgs, spectral
from ds_higgs.data.codec.source import AudioCodec, CodecSource
from ds_higgs.errors import UserError
from ds_higgs.files import read_json

KINDS = (dac.KIND, higgs.KIND, spectral.KIND)


def find_codec(codec: str | Path | None, base: Path | None = None) -> CodecSource:
    """Describe the codec that a config names.

    codec: a folder, a hub id, or None for the base checkpoint's own `codec` folder, else the released Higgs tokenizer.

    Raises:
        UserError: there is no codec, or one of an unknown kind.
    """
    if codec is None:
        own = base / "codec" if base is not None else None
        codec = own if own is not None and own.is_dir() else hub.HIGGS_TOKENIZER
    folder = Path(codec)
    return describe_codec(folder if folder.exists() else hub.download(str(codec), what="audio codec"))


def load_codec(codec: str | Path, *, device: torch.device | str = "cpu") -> AudioCodec:
    """Describe and load a codec at once."""
    return find_codec(codec).load(device)


def describe_codec(folder: Path) -> CodecSource:
    """Read a codec folder's config.json and fingerprint its weights.

    Raises:
        UserError: it is of none of KINDS, or something is missing.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not an audio codec: there is no config.json")
    config = read_json(folder / "config.json")
    for kind in KINDS:
        if kind.recognises(folder, config):
            try:
                return kind.describe(folder, config)
            except KeyError as error:
                raise UserError(f"{folder / 'config.json'}: the audio codec's config lacks {error}") from None
    raise UserError(f"{folder}: not an audio codec; expected " + ", or ".join(kind.expected for kind in KINDS))
