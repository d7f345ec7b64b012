"""Boson's Higgs audio tokenizer as an AudioCodec."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ds_higgs import hub
from ds_higgs.data.codec.batched import BatchedCodec
from ds_higgs.data.codec.source import CodecKind, CodecSource, Geometry
from ds_higgs.data.codec.torchaudio_stand_in import provide_torchaudio
from ds_higgs.errors import UserError
from ds_higgs.files import read_json
from ds_higgs.job.preflight import HOW_TO_INSTALL_BOSON

# Inside a codec's folder, where `ds-higgs download --out` puts it; boson's tokenizer fetches it by its name.
SEMANTIC_FOLDER = "semantic_model"
SEMANTIC_FILES = ("*.json", "*.safetensors", "*.bin")
# The semantic models that boson's tokenizer knows, by the codec's config.json.
_SEMANTIC_REPOSITORIES = {
    "hubert_base_general": "bosonai/hubert_base",
    "hubert_base": "facebook/hubert-base-ls960",
    "wavlm_base_plus": "microsoft/wavlm-base-plus",
}


class HiggsTokenizerCodec(BatchedCodec):
    """A folder with boson's config.json and model.pth; see AudioCodec."""

    def __init__(self, source: CodecSource, *, device: torch.device | str = "cpu"):
        super().__init__(source, device=device)
        self._tokenizer = _load_tokenizer(source.folder, str(device))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> np.ndarray:
        return self._tokenizer.decode(codes.unsqueeze(0)).reshape(-1).astype(np.float32)

    def _encode_batch(self, batch: torch.Tensor) -> torch.Tensor:
        # The public `encode` takes one clip; with whole frames it does this and nothing more.
        return self._tokenizer._xcodec_encode(batch.unsqueeze(1)).audio_codes


def import_tokenizer() -> Any:
    """Boson's module of its audio tokenizer.

    Raises:
        UserError: a package that it needs is not installed; says how to install it.
    """
    provide_torchaudio()
    try:
        from boson_multimodal.audio_processing import higgs_audio_tokenizer
    except ImportError as error:
        raise UserError(
            f"the Higgs audio tokenizer needs {error.name or error}; install it: {HOW_TO_INSTALL_BOSON}"
        ) from None
    return higgs_audio_tokenizer


def _load_tokenizer(folder: Path, device: str) -> Any:
    higgs_audio_tokenizer = import_tokenizer()
    semantic_model = folder / SEMANTIC_FOLDER
    with _semantic_model_from(higgs_audio_tokenizer, semantic_model if semantic_model.is_dir() else None):
        try:
            tokenizer = higgs_audio_tokenizer.load_higgs_audio_tokenizer(str(folder), device=device)
        except (RuntimeError, TypeError, KeyError, OSError) as error:
            raise UserError(f"{folder}: the Higgs audio tokenizer cannot be loaded: {error}") from None
    _check_complete(folder, tokenizer)
    return tokenizer


def semantic_repository(codec: Path) -> str | None:
    """The hub repository of the semantic model that the codec in a folder needs besides; None if it needs none."""
    config = read_json(codec / "config.json")
    return _SEMANTIC_REPOSITORIES.get(str(config.get("semantic_techer"))) if _recognises(codec, config) else None


def _semantic_files(codec: Path) -> list[Path]:
    """Config and weights of the semantic model, which the codes follow as they follow the codec's own weights.

    Raises:
        UserError: it lies neither in the codec's folder nor in the hub's cache, and the hub cannot be asked.
    """
    repository = semantic_repository(codec)
    if repository is None:
        return []
    own = codec / SEMANTIC_FOLDER
    folder = own if own.is_dir() else _download_semantic_model(repository)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))  # as transformers chooses
    if not weights or not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not the audio codec's semantic model: expected config.json and weights")
    return [folder / "config.json", *weights]


def _download_semantic_model(repository: str) -> Path:
    return hub.download(repository, what="the audio codec's semantic model", files=SEMANTIC_FILES)


@contextmanager
def _semantic_model_from(module: Any, folder: Path | None) -> Iterator[None]:
    """Let boson's tokenizer take its semantic model from `folder`, or from the hub as everything else comes from it.

    Boson loads it with trust_remote_code=True; it is a plain HuBERT and needs none.
    """

    class AutoModel:
        @staticmethod
        def from_pretrained(name: str, **_: Any) -> torch.nn.Module:
            found = folder or _download_semantic_model(name)
            return transformers.AutoModel.from_pretrained(found, trust_remote_code=False)

    original = module.AutoModel
    module.AutoModel = AutoModel
    try:
        yield
    finally:
        module.AutoModel = original


def _check_complete(folder: Path, tokenizer: torch.nn.Module) -> None:
    """Boson loads with strict=False: what is missing in model.pth would stay random. HuBERT has its own weights."""
    saved = torch.load(folder / "model.pth", map_location="cpu", weights_only=True, mmap=True)
    missing = [name for name in tokenizer.state_dict() if name not in saved and not name.startswith("semantic_model.")]
    if missing:
        raise UserError(f"{folder / 'model.pth'}: {len(missing)} tensors are missing, the first is {missing[0]}")


def _recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    return "ratios" in config and (folder / "model.pth").is_file()


def _read_geometry(config: Mapping[str, Any]) -> Geometry:
    bins = config.get("bins", 1024)
    return Geometry(
        sampling_rate=config.get("sample_rate", 16000),
        hop_length=int(np.prod(config["ratios"])),
        num_codebooks=config.get("n_q", 8),
        codebook_size=bins if isinstance(bins, int) else int(np.prod(bins)),
    )


def _load(source: CodecSource, device: torch.device | str) -> HiggsTokenizerCodec:
    return HiggsTokenizerCodec(source, device=device)


KIND = CodecKind(
    name="higgs",
    weights="model.pth",
    recognises=_recognises,
    read_geometry=_read_geometry,
    load=_load,
    expected="boson's tokenizer: config.json with `ratios` beside model.pth",
    other_files=_semantic_files,
)
