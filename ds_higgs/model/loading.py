"""Finds a base checkpoint (a folder or a hub repository) and loads its config, tokenizer and model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ds_higgs.errors import UserError
from ds_higgs.files import read_json
from ds_higgs.hub import ORIGINAL_REVISION, RELEASED_REPOSITORY, download, is_released
from ds_higgs.job.logs import without_bars
from ds_higgs.model import native_format
from ds_higgs.model.fp8 import use_fp8
from ds_higgs.model.quantization import build_quantization_config
from ds_higgs.model.signature import check_model_class
from ds_higgs.model.split_weights import split_stored_weights
from ds_higgs.model.weight_files import Shapes, StoredWeights, weight_file_names

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the configuration's names of precisions

logger = logging.getLogger("ds_higgs")

BASE_FILES = ("*.json", "*.safetensors", "*.txt", "codec/*", "LICENSE*", "NOTICE*")


def resolve_base(base: str, revision: str | None) -> Path:
    """The folder of a base checkpoint: `base` itself if it is one, else a snapshot of the hub repository `base`.

    Of the released repository, revision None means the pinned one in the original format.

    Raises:
        UserError: if `base` is neither, cannot be downloaded, or holds no Higgs Audio checkpoint.
    """
    folder = Path(base).expanduser()
    if not folder.exists():
        folder = download(base, what="base checkpoint", revision=revision, files=BASE_FILES)
    _check_has_higgs_config(folder)
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")  # transformers goes on without one that is damaged
    if not any((folder / name).is_file() for name in weight_file_names()):
        raise UserError(f"{folder}: no weights: expected {' or '.join(weight_file_names())}")
    return folder


def read_model_config(base: Path) -> HiggsAudioConfig:
    """Read `base`/config.json, in the original format whatever the file's.

    Raises:
        UserError: it lacks something, or holds what no model can be built from.
    """
    try:
        if native_format.is_native(base):
            return native_format.read_original_config(base)
        config = HiggsAudioConfig.from_pretrained(base, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # the config classes check little and raise of every kind
        raise UserError(f"{base / 'config.json'}: not the config of a Higgs Audio model: {error!r}") from error
    if not isinstance(config.text_config, PretrainedConfig):
        raise UserError(f"{base / 'config.json'}: text_config is {config.text_config!r}, expected an object")
    return config


def read_config_only(base: str, revision: str | None) -> HiggsAudioConfig:
    """The config of `base`, a folder or a hub repository, without its weights; the released one's needs no network.

    Raises:
        UserError: if `base` is neither, or its config.json is none of a Higgs Audio model.
    """
    folder = Path(base).expanduser()
    if not folder.exists():
        if is_released(base) and revision in (None, ORIGINAL_REVISION):
            return released_model_config()
        folder = download(base, what="base checkpoint", revision=revision, files=["config.json"])
    _check_has_higgs_config(folder)
    return read_model_config(folder)


def released_model_config() -> HiggsAudioConfig:
    """The released checkpoint's config, which comes with this package."""
    return HiggsAudioConfig.from_json_file(str(Path(__file__).with_name("released_config.json")))


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from `base`'s own files.

    Raises:
        UserError: if the files are missing or unreadable, or the audio tokens' ids differ from config.json's.
    """
    if not (base / "tokenizer_config.json").is_file():
        raise UserError(f"{base}: the tokenizer is missing: expected tokenizer_config.json and tokenizer.json")
    try:
        tokenizer = _build_tokenizer(base)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise UserError(f"{base}: the tokenizer cannot be loaded: {error}") from error
    config = read_model_config(base)
    for token, key in (
        (config.audio_in_token, "audio_in_token_idx"),
        (config.audio_out_token, "audio_out_token_idx"),
        (config.audio_out_bos_token, "audio_out_bos_token_id"),
        (config.audio_eos_token, "audio_eos_token_id"),
    ):
        found = tokenizer.get_vocab().get(token)
        if found != getattr(config, key):
            raise UserError(
                f"{base}: tokenizer and config.json do not belong together: "
                f"{token} is {found} in the tokenizer, config.json has {key} = {getattr(config, key)}"
            )
    return tokenizer


def load_model(
    base: Path,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    allow_fork: bool = False,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
    split_by: Mapping[str, Any] | None = None,
) -> HiggsAudioModel:
    """Load the model of `base` in training mode.

    Args:
        attention: "sdpa", "eager" or "flash_attention_2".
        quantization: None, "nf4" or "fp8" (see `quantization.check_quantization`).
        device: each weight goes there as it is read, so that the CPU's memory never holds the weights of a GPU's model.
        split_by: a DeepSpeed JSON of ZeRO-3, by which each weight is split over the ranks as it is read; every rank
            then loads the model, and quantization is None.

    Raises:
        UserError: for a model class that is not boson_multimodal's (before weights are read), unreadable weight
            files, and weights that do not fit config.json.
    """
    check_model_class(HiggsAudioModel, allow_fork=allow_fork)
    check_weights_fit(base)
    native = native_format.is_native(base)
    if native and quantization == "nf4":
        raise UserError(
            f"{base}: model.quantization needs a checkpoint in the original format, found that of transformers "
            f">= 5.3; use revision {ORIGINAL_REVISION} of {RELEASED_REPOSITORY}"
        )
    if native:
        logger.info("%s: in the format of transformers >= 5.3, converted while loading", base)
    assert split_by is None or quantization is None, "quantized weights cannot be split"
    if quantization != "nf4":
        model = _load(base, dtype=dtype, attention=attention, device=device, split_by=split_by).train()
        if quantization == "fp8":
            use_fp8(model)
        return model
    with without_bars():  # of shards
        model = HiggsAudioModel.from_pretrained(
            base,
            torch_dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=True,
            quantization_config=build_quantization_config(quantization, dtype=dtype),
        )
    return model.train()


def _load(
    base: Path,
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device | str,
    split_by: Mapping[str, Any] | None,
) -> HiggsAudioModel:
    """Build the model around the stored weights, under their original names."""
    with init_empty_weights(include_buffers=False):
        model = HiggsAudioModel._from_config(read_model_config(base), torch_dtype=dtype, attn_implementation=attention)
    model.name_or_path = str(base)  # as from_pretrained does: PEFT writes it into an adapter's config
    stored = open_base_weights(base)
    if split_by is None:
        weights = {name: stored.read(name).to(device, dtype, copy=True) for name in stored.files}
        model.load_state_dict(weights, assign=True)
    else:
        split_stored_weights(model, stored, dtype=dtype, device=device, deepspeed_config=split_by)
    if not native_format.is_native(base) and (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base, local_files_only=True)
    return model.to(device)


def _build_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    if not native_format.is_native(base):
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
    # transformers 5 writes class names that 4.46 does not know, around the same tokenizer.json
    return PreTrainedTokenizerFast(
        tokenizer_file=str(base / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )


def build_meta_model(config: HiggsAudioConfig) -> HiggsAudioModel:
    """The model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return HiggsAudioModel(config)


def check_weights_fit(base: Path) -> None:
    """Compare names and shapes in the weight files' headers with the model of config.json.

    transformers cannot be asked: with `low_cpu_mem_usage` its loading info leaves out missing weights that have the
    shape of another one, and those stay uninitialised.

    Raises:
        UserError: listing what differs.
    """
    meta_model = build_meta_model(read_model_config(base))
    expected = {name: tuple(weight.shape) for name, weight in meta_model.state_dict().items()}
    found = StoredWeights.open(base).shapes
    problems: list[str] = []
    if native_format.is_native(base):
        found, problems = _rename_shapes(found)
    problems += [f"missing: {name}" for name in expected if name not in found]
    problems += [f"not in the model: {name}" for name in found if name not in expected]
    problems += [
        f"{name}: found shape {shape}, expected {expected[name]}"
        for name, shape in found.items()
        if shape != expected.get(name, shape)
    ]
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError.from_problems(f"{base}: the weights do not fit config.json:", problems[:20] + more)


def open_base_weights(base: Path) -> StoredWeights:
    """The weights of `base`, which fit its config.json, under their original names and with nothing read yet."""
    stored = StoredWeights.open(base)
    if native_format.is_native(base):
        return stored.renamed({name: native_format.to_original_name(name) for name in stored.files})
    return stored


def _rename_shapes(shapes: Shapes) -> tuple[Shapes, list[str]]:
    """The shapes of a native checkpoint under the original names, and a line for every unknown name."""
    renamed, problems = {}, []
    for name, shape in shapes.items():
        try:
            renamed[native_format.to_original_name(name)] = shape
        except KeyError:
            problems.append(f"not in the model: {name}")
    return renamed, problems


def _check_has_higgs_config(folder: Path) -> None:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder}: not a Higgs Audio checkpoint: it has no config.json")
    model_type = read_json(config_file).get("model_type")
    if model_type not in (HiggsAudioConfig.model_type, native_format.MODEL_TYPE):
        raise UserError(
            f"{config_file}: not a Higgs Audio checkpoint: model_type is {model_type!r}, "
            f"expected {HiggsAudioConfig.model_type!r} or {native_format.MODEL_TYPE!r}"
        )
