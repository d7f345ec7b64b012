"""Writes models and adapters in the format of transformers >= 5.3."""

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from ds_higgs.adapters.merging import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ds_higgs.files import read_json, write_json
from ds_higgs.model import native_format
from ds_higgs.model.loading import HiggsAudioConfig, HiggsAudioModel

# As boson's serve engine samples: repetition-aware, and no top-k.
SAMPLING_DEFAULTS = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 0,
    "ras_win_len": 7,
    "ras_win_max_num_repeat": 2,
}


def save_native_model(model: HiggsAudioModel, folder: Path, *, eos_token_id: int) -> None:
    """Write config.json, generation_config.json and the weights of `model`, in its dtype.

    Args:
        eos_token_id: id of `<|eot_id|>`.

    Raises:
        UserError: if the native implementation cannot do what the model's config asks for.
    """
    write_native_configs(model.config, folder, dtype=model.dtype, eos_token_id=eos_token_id)
    weights = {native_format.to_native_name(name): weight for name, weight in model.state_dict().items()}
    save_torch_state_dict(weights, folder)


def write_native_configs(config: HiggsAudioConfig, folder: Path, *, dtype: torch.dtype, eos_token_id: int) -> None:
    """Write config.json and generation_config.json of a model with the original `config`, stored in `dtype`.

    Raises:
        UserError: if the native implementation cannot do what `config` asks for.
    """
    native = native_format.to_native_config(config, eos_token_id=eos_token_id)
    native["dtype"] = str(dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", native)
    token_ids = {key: native[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", token_ids | SAMPLING_DEFAULTS)


def save_native_adapter(adapter: Path, folder: Path, *, base: str) -> None:
    """Write the adapter in `adapter` for the native model `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    renamed = {native_format.to_native_adapter_name(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = read_json(adapter / ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, native_format.to_native_adapter_config(config, base=base))
