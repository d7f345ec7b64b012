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
from ds_higgs.checkpoint.deepspeed_parts import (
    AVERAGE,
    MASTER,
    WholeState,
    module_read_from,
    moments_of,
    reads_through,
    slice_stage_3,
    slice_stages_1_and_2,
)
from ds_higgs.checkpoint.pt_files import PtReader, pt_files, read_pt
from ds_higgs.errors import UserError

SPLITTABLE = {"exp_avg", "exp_avg_sq", AVERAGE}


@contextmanager
def resharded_reads(engine, path: Path, saved_world_size: int) -> Iterator[None]:
    """Let `engine.load_checkpoint(path)` see a checkpoint that as many ranks saved as there are now."""
    reader = _ReshardingReader(engine, path, saved_world_size)
    with reads_through(engine, reader), module_read_from(engine, reader.module_file):
        yield


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
        check_can_be_split(shards[0], self._shard_files)
        if self.engine.zero_optimization_stage() == 3:
            shapes = read_pt(self.module_file)["param_shapes"]
            return {"optimizer_state_dict": slice_stage_3(self.engine, join_stage_3(shards, shapes), shards[0])}
        whole = join_stages_1_and_2(shards)
        return {"optimizer_state_dict": slice_stages_1_and_2(self.engine, whole, shards[0])}


def check_can_be_split(shard: dict, files: list[Path]) -> None:
    """Raises UserError for an optimizer whose state is not one number for each weight, in the weights' order."""
    optimizer = shard["base_optimizer_state" if "base_optimizer_state" in shard else "optimizer_state_dict"]
    states = optimizer["state"].values()
    if others := {key for state in states for key in moments_of(state)} - SPLITTABLE:
        raise UserError(
            f"{files[0].parent}: its optimizer's state ({', '.join(sorted(others))}) cannot be split anew; expected "
            f"{len(files)} ranks, which saved it, or optim.type adamw"
        )


def join_stages_1_and_2(shards: list[dict]) -> WholeState:
    """Whole tensors from shards that each say where their pieces of a parameter lie."""
    pieces: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for shard in shards:  # in rank order, so that a parameter's pieces come in its own order
        for group, addresses in enumerate(shard["param_slice_mappings"]):
            flat = {MASTER: shard["single_partition_of_fp32_groups"][group]}
            flat |= moments_of(shard["base_optimizer_state"]["state"].get(group, {}))
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
                **moments_of(shard["optimizer_state_dict"]["state"].get(group, {})),
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
