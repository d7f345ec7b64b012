"""The trained weights in a checkpoint, or their average, by name, read one at a time whatever the ZeRO stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from ds_higgs.checkpoint.deepspeed_parts import AVERAGE
from ds_higgs.checkpoint.finding import verify_checkpoint
from ds_higgs.checkpoint.marker import Marker, read_marker
from ds_higgs.checkpoint.pt_files import pt_files, read_pt
from ds_higgs.errors import UserError

_MODULE_FILE = "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class CheckpointWeights:
    """Trained weights of a checkpoint that is complete; its files are opened anew for every tensor, and let go.

    averaged: read the average of the weights, which is in the checkpoint where the run keeps one.
    """

    path: Path
    marker: Marker
    averaged: bool = False

    @classmethod
    def open(cls, path: Path) -> "CheckpointWeights":
        """Raises UserError if the checkpoint is incomplete or damaged."""
        if problems := verify_checkpoint(path):
            raise UserError.from_problems(f"the checkpoint {path} cannot be used:", problems)
        return cls(path, read_marker(path))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every trained tensor, under the name that it has in DeepSpeed's module."""
        return {name: tuple(shape) for name, shape in self.marker.trainable}

    def read(self, name: str) -> torch.Tensor:
        """One tensor: in the precision of the run, or in fp32 an average or what comes from ZeRO-3's masters.

        Raises:
            UserError: a file asks to run code.
        """
        if self.averaged and (average := self._read_average(name)) is not None:
            return average
        if self.marker.zero_stage == 3:
            return self._gather(name, lambda shard, group: shard["fp32_flat_groups"][group])
        return read_pt(self.path / _MODULE_FILE, mapped=True)["module"][name]

    def _read_average(self, name: str) -> torch.Tensor | None:
        """None: no update has been made, and the average is what the weights are."""
        if not self._has_average:
            return None
        if self.marker.zero_stage == 3:
            return self._gather(name, lambda shard, group: shard["optimizer_state_dict"]["state"][group][AVERAGE])
        if self.marker.zero_stage == 0:
            return self._whole_states()[list(self.shapes).index(name)][AVERAGE]
        return self._join(name)

    @cached_property
    def _has_average(self) -> bool:
        if self.marker.zero_stage == 0:
            states = self._whole_states()
        else:
            shard = read_pt(pt_files(self.path, "optim_states.pt")[0], mapped=True)["optimizer_state_dict"]
            states = shard["optimizer_state_dict" if self.marker.zero_stage == 3 else "base_optimizer_state"]["state"]
        return AVERAGE in states.get(0, {})

    def _whole_states(self) -> dict[int, dict[str, Any]]:
        """Stage 0: the optimizer's states, in the order of the tensors."""
        optimizer = read_pt(self.path / _MODULE_FILE, mapped=True)["optimizer"]
        return optimizer.get("optimizer_state_dict", optimizer)["state"]

    def _join(self, name: str) -> torch.Tensor:
        """Stages 1 and 2: every rank's shard says where in it a piece of the tensor lies, if it has any."""
        pieces = []
        for file in pt_files(self.path, "optim_states.pt"):
            shard = read_pt(file, mapped=True)["optimizer_state_dict"]
            for group, addresses in enumerate(shard["param_slice_mappings"]):
                if (address := addresses.get(name)) is not None:
                    flat = shard["base_optimizer_state"]["state"][group][AVERAGE]
                    pieces.append(flat[address.start : address.start + address.numel].clone())
        return torch.cat(pieces).view(self.shapes[name])

    def _gather(self, name: str, find: Callable[[dict[str, Any], int], torch.Tensor]) -> torch.Tensor:
        """Stage 3: every rank's shard holds an equal part of every tensor, the last one padded.

        Args:
            find: a flat group in a shard.
        """
        files = pt_files(self.path, "optim_states.pt")
        group, offset, shape = self._place(name, num_ranks=len(files))
        part = ceil(prod(shape) / len(files))
        pieces = []
        for file in files:
            flat = find(read_pt(file, mapped=True)["optimizer_state_dict"], group)
            pieces.append(flat[offset : offset + part].clone())
        return torch.cat(pieces)[: prod(shape)].view(shape)

    def _place(self, name: str, *, num_ranks: int) -> tuple[int, int, tuple[int, ...]]:
        """The flat group of a tensor, where its part begins in a rank's share of it, and its shape."""
        groups = read_pt(pt_files(self.path, "model_states.pt")[0], mapped=True)["param_shapes"]
        for group, shapes in enumerate(groups):
            offset = 0
            for other, shape in shapes.items():
                if other == name:
                    return group, offset, tuple(shape)
                offset += ceil(prod(shape) / num_ranks)
        raise KeyError(name)
