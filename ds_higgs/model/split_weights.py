"""Weights that ZeRO-3 splits over the ranks: each as it comes, and whole again where one is looked at."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn

from ds_higgs.job import distributed
from ds_higgs.model.weight_files import StoredWeights


def split_stored_weights(
    model: nn.Module,
    stored: StoredWeights,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    deepspeed_config: Mapping[str, Any],
) -> None:
    """Give `model`, on the meta device, the weights of `stored`, of which each rank holds its share.

    Rank 0 reads them, one after the other, and the others take them from it: no rank ever holds more than its share and
    one of them. Every rank calls this.

    Args:
        deepspeed_config: the JSON that the model will be trained with, of ZeRO-3.
    """
    names = [name for name, _ in model.named_parameters()]
    assert set(names) == set(stored.files), "a stored buffer, which is nothing to split"
    # One room for all of them: what comes and goes in a heap beside shares that stay leaves gaps as large as the base.
    room = torch.empty(max(prod(stored.shapes[name]) for name in names), dtype=dtype, device=device)
    reads = distributed.is_main_rank()

    def read(name: str) -> torch.Tensor:
        shape = tuple(stored.shapes[name])
        weight = room[: prod(shape)].view(shape)
        return weight.copy_(stored.read(name)) if reads else weight

    _split((_replace(model, name, read(name)) for name in names), deepspeed_config)


def _replace(model: nn.Module, name: str, weight: torch.Tensor) -> nn.Parameter:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = nn.Parameter(weight, requires_grad=getattr(module, attribute).requires_grad)
    setattr(module, attribute, parameter)
    return parameter


def _split(coming: Iterator[nn.Parameter], deepspeed_config: Mapping[str, Any]) -> None:
    """Split each parameter before the next one is asked for; every rank gets what rank 0 has."""
    import deepspeed  # takes seconds, and few models are split

    first: Any = next(coming)
    deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=copy.deepcopy(dict(deepspeed_config)))
    first.convert_to_zero_parameters(coming)


def is_split(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has split it, so that it may hold nothing."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Its shape, also where ZeRO-3 has split it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[torch.Tensor], *, changed: bool = False) -> Iterator[None]:
    """Have those of `parameters` that are split be whole meanwhile. Every rank calls this.

    Args:
        changed: whether they are written to; all ranks then take what rank 0 has.
    """
    split = [parameter for parameter in parameters if is_split(parameter)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if changed else None):
        yield


@contextmanager
def gathered_by_peft(model: nn.Module) -> Iterator[None]:
    """Have PEFT make weights of `model` whole where it reads them, as for DoRA: it asks transformers whether to."""
    if not any(map(is_split, model.parameters())):
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    asked = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    yield
    del asked  # transformers keeps no more than a weak reference
