"""The whole model with weights that a run trained themselves: streamed from base and run, in either format."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ds_higgs.adapters.native import write_native_configs
from ds_higgs.adapters.whole import WholeWeights
from ds_higgs.model.loading import open_base_weights, read_model_config
from ds_higgs.model.native_format import is_native, to_native_name
from ds_higgs.model.weight_files import StoredWeights, write_weights

GENERATION_CONFIG = "generation_config.json"


def write_whole_model(
    base: Path,
    whole: WholeWeights,
    out: Path,
    *,
    dtype: torch.dtype,
    eos_token_id: int | None = None,
    scale: float = 1.0,
    where: str,
) -> None:
    """Write config and weights of `base` with the trained ones in place; of those, one at a time is in memory.

    Args:
        eos_token_id: id of `<|eot_id|>`, to write the format of transformers; None: the original one.
        scale: how much of what was trained: 0 is the base.
        where: what `whole` is of, for messages.

    Raises:
        UserError: the two do not fit, or the format cannot hold the model.
    """
    stored = open_base_weights(base)
    whole.check_fit(stored.shapes, where=where)
    config = read_model_config(base)
    config.torch_dtype = dtype
    native = eos_token_id is not None
    if eos_token_id is not None:
        write_native_configs(config, out, dtype=dtype, eos_token_id=eos_token_id)
    else:
        config.architectures = ["HiggsAudioModel"]
        config.save_pretrained(out)
        if (base / GENERATION_CONFIG).is_file() and not is_native(base):
            shutil.copyfile(base / GENERATION_CONFIG, out / GENERATION_CONFIG)
    names = {name: to_native_name(name) if native else name for name in stored.shapes}
    tensors = ((names[name], tensor) for name, tensor in _tensors(stored, whole, scale))
    write_weights(out, tensors, shapes={names[name]: shape for name, shape in stored.shapes.items()}, dtype=dtype)


def _tensors(stored: StoredWeights, whole: WholeWeights, scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    for name in stored.shapes:
        of_base = stored.read(name)
        yield name, whole.scaled(name, of_base, scale) if name in whole.shapes else of_base
