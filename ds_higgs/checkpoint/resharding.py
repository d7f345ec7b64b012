"""Load a ZeRO checkpoint of N ranks on M ranks: whole tensors by name from all shards, sliced anew for this rank.

LoRA's optimizer state is small (12 bytes a trained weight), so every rank reads all of it. DeepSpeed's own load then
runs as usual; only the files that it reads are another view of those on the disk.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import ds_higgs.checkpoint.collective as collective
from ds_higgs.checkpoint.pt_files import PtReader, pt_files, read_pt, reads_through

MASTER = "fp32"  # the key of the fp32 master weights beside the optimizer's own exp_avg and exp_avg_sq

# {state key: {parameter name: whole flat tensor}}
WholeState = dict[str, dict[str, torch.Tensor]]


@contextmanager
def resharded_reads(engine, path: Path, saved_world_size: int) -> Iterator[None]:
    """Let `engine.load_checkpoint(path)` see a checkpoint that as many ranks saved as there are now."""
    reader = _ReshardingReader(engine, path, saved_world_size)
    engine._get_all_ckpt_names = lambda load_dir, tag: [str(reader.module_file)]
    try:
        with reads_through(engine, reader):
            yield
    finally:
        del engine._get_all_ckpt_names


class _ReshardingReader(PtReader):
    def __init__(self, engine, path: Path, saved_world_size: int):
        super().__init__()
        self.engine = engine
        self.module_file = pt_files(path, "model_states.pt")[0]
        self._shard_files = pt_files(path, "optim_states.pt")
        assert len(self._shard_files) in (0, saved_world_size), self._shard_files

    def load(self, path: str, map_location: object = None) -> dict:
        if Path(path) == self.module_file:
            return {**read_pt(self.module_file), "dp_world_size": collective.world_size()}
        shards = [read_pt(file)["optimizer_state_dict"] for file in self._shard_files]
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 3:
            shapes = read_pt(self.module_file)["param_shapes"]
            return {"optimizer_state_dict": _slice_stage_3(self.engine, join_stage_3(shards, shapes), shards[0])}
        whole = join_stages_1_and_2(shards)
        return {"optimizer_state_dict": _slice_stages_1_and_2(optimizer, self.engine.param_names, whole, shards[0])}


def join_stages_1_and_2(shards: list[dict]) -> WholeState:
    """Whole tensors from shards that each say where their pieces of a parameter lie."""
    pieces: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for shard in shards:  # in rank order, so that a parameter's pieces come in its own order
        for group, addresses in enumerate(shard["param_slice_mappings"]):
            flat = {MASTER: shard["single_partition_of_fp32_groups"][group]}
            flat |= _moments(shard["base_optimizer_state"]["state"].get(group, {}))
            for name, address in addresses.items():
                for key, tensor in flat.items():
                    pieces[key][name].append(tensor[address.start : address.start + address.numel])
    return {key: {name: torch.cat(parts) for name, parts in named.items()} for key, named in pieces.items()}


def join_stage_3(shards: list[dict], shapes: list[dict[str, torch.Size]]) -> WholeState:
    """Whole tensors from shards that hold an equal part of every parameter, the last one padded."""
    whole: WholeState = defaultdict(dict)
    for group, named_shapes in enumerate(shapes):
        flats = [
            {
                MASTER: shard["fp32_flat_groups"][group],
                **_moments(shard["optimizer_state_dict"]["state"].get(group, {})),
            }
            for shard in shards
        ]
        offset = 0
        for name, shape in named_shapes.items():
            part = math.ceil(shape.numel() / len(shards))
            for key in flats[0]:
                padded = torch.cat([flat[key][offset : offset + part] for flat in flats])
                whole[key][name] = padded[: shape.numel()]
            offset += part
    return whole


def _slice_stages_1_and_2(optimizer, names: dict, whole: WholeState, source: dict) -> dict:
    """This rank's optimizer state dict, in the layout of its own engine."""
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
                piece = named[names[parameter]][there.start : there.start + there.numel]
                flat[key][here.start : here.start + here.numel] = piece
        target["single_partition_of_fp32_groups"][group] = flat.pop(MASTER)
        target["base_optimizer_state"]["state"][group] = {**_scalars(source["base_optimizer_state"], group), **flat}
    return target


def _slice_stage_3(engine, whole: WholeState, source: dict) -> dict:
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


def _moments(state: dict) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0}


def _scalars(optimizer_state: dict, group: int) -> dict:
    """Adam's step count, which is not partitioned."""
    state = optimizer_state["state"].get(group, {})
    return {key: value for key, value in state.items() if key not in _moments(state)}
