"""The private parts of DeepSpeed 0.19 that checkpoints need, all of them here: see what moved when its version does."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

import ds_higgs.checkpoint.collective as collective

MASTER = "fp32"  # the key of the fp32 master weights beside the optimizer's own exp_avg and exp_avg_sq
AVERAGE = "average"  # of the masters, where a run keeps one: in the optimizer's state, beside its own

# {state key: {parameter name: whole flat tensor}}
WholeState = dict[str, dict[str, torch.Tensor]]


@contextmanager
def reads_through(engine: DeepSpeedEngine, reader: Any) -> Iterator[None]:
    """Let an engine load every file with `reader`, a checkpoint engine of DeepSpeed's."""
    usual, engine.checkpoint_engine = engine.checkpoint_engine, reader
    try:
        yield
    finally:
        engine.checkpoint_engine = usual


@contextmanager
def writes_through(engine: DeepSpeedEngine, writer: Any) -> Iterator[None]:
    """Let an engine save every file with `writer`, and leave its recovery scripts out of the folder."""
    engine._copy_recovery_script = lambda save_path: None  # `python -m deepspeed.utils.zero_to_fp32` does the same
    try:
        with reads_through(engine, writer):
            yield
    finally:
        del engine._copy_recovery_script


@contextmanager
def module_read_from(engine: DeepSpeedEngine, file: Path) -> Iterator[None]:
    """Let an engine take the module's weights from `file`, however many ranks there are."""
    engine._get_all_ckpt_names = lambda load_dir, tag: [str(file)]
    try:
        yield
    finally:
        del engine._get_all_ckpt_names


def zero_param_shapes(engine: DeepSpeedEngine) -> list[tuple[str, list[int]]]:
    """Name and whole shape of every parameter, in the order of the optimizer's flat groups."""
    return [(name, list(shape)) for group in engine._get_zero_param_shapes() for name, shape in group.items()]


def masters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The fp32 weights that this rank updates, in its optimizer's order: from stage 1 on flat, its share of them."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage in (1, 2):
        return list(optimizer.single_partition_of_fp32_groups)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return list(chain.from_iterable(optimizer.fp32_groups))
    return list(whole_parameters(engine))


def whole_parameters(engine: DeepSpeedEngine) -> list[torch.nn.Parameter]:
    """At stage 0: the trained parameters in the order of the optimizer's groups, which `masters` has too."""
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return list(chain.from_iterable(optimizer.fp16_groups))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def publish_masters(engine: DeepSpeedEngine) -> None:
    """Give the weights in training their masters' values, as an update does. Every rank calls it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for weights, of_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            torch._foreach_copy_(weights, of_group)


def slice_stages_1_and_2(engine: DeepSpeedEngine, whole: WholeState, source: dict) -> dict:
    """This rank's optimizer state dict, in the layout of its own engine.

    Args:
        source: any shard, for Adam's step count.
    """
    optimizer = engine.optimizer
    target = optimizer.state_dict()
    partitions = optimizer.single_partition_of_fp32_groups
    for group, (parameters, partition) in enumerate(zip(optimizer.bit16_groups, partitions, strict=True)):
        flat = {key: torch.zeros(partition.numel()) for key in whole}
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # lies wholly in other ranks' partitions
                continue
            here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            for key, named in whole.items():
                piece = named[engine.param_names[parameter]][there.start : there.start + there.numel]
                flat[key][here.start : here.start + here.numel] = piece
        target["single_partition_of_fp32_groups"][group] = flat.pop(MASTER)
        target["base_optimizer_state"]["state"][group] = {**_scalars(source["base_optimizer_state"], group), **flat}
    return target


def slice_stage_3(engine: DeepSpeedEngine, whole: WholeState, source: dict) -> dict:
    """The same at stage 3, where every rank holds an equal part of every parameter, the last one padded."""
    optimizer = engine.optimizer
    target = optimizer.state_dict()
    world_size, rank = collective.world_size(), collective.rank()
    for group, parameters in enumerate(optimizer.fp16_groups):
        flat: dict[str, list[torch.Tensor]] = {key: [] for key in whole}
        for parameter in parameters:
            part = math.ceil(parameter.ds_numel / world_size)
            for key, named in whole.items():
                padded = torch.zeros(part * world_size)
                padded[: parameter.ds_numel] = named[engine.param_names[parameter]]
                flat[key].append(padded[part * rank : part * (rank + 1)])
        joined = {key: torch.cat(parts) for key, parts in flat.items()}
        target["fp32_flat_groups"][group] = joined.pop(MASTER)
        target["optimizer_state_dict"]["state"][group] = {**_scalars(source["optimizer_state_dict"], 0), **joined}
    return target


def moments_of(state: dict) -> dict[str, torch.Tensor]:
    """The tensors of a parameter's optimizer state, Adam's step count left out."""
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0}


def _scalars(optimizer_state: dict, group: int) -> dict:
    """Adam's step count, which is not partitioned; a copy, as each group counts its own on in place."""
    state = optimizer_state["state"].get(group, {})
    return {key: deepcopy(value) for key, value in state.items() if key not in moments_of(state)}
