"""The trained weights in a checkpoint, by name, read one at a time whatever the ZeRO stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import torch

from ds_higgs.checkpoint.finding import verify_checkpoint
from ds_higgs.checkpoint.marker import Marker, read_marker
from ds_higgs.checkpoint.pt_files import pt_files, read_pt
from ds_higgs.errors import UserError


@dataclass(frozen=True)
class CheckpointWeights:
    """Trained weights of a checkpoint that is complete; its files are opened anew for every tensor, and let go."""

    path: Path
    marker: Marker

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
        """One tensor: in the precision of the run, or in fp32 from ZeRO-3's masters.

        Raises:
            UserError: a file asks to run code.
        """
        if self.marker.zero_stage == 3:
            return self._gather(name)
        return read_pt(self.path / "mp_rank_00_model_states.pt", mapped=True)["module"][name]

    def _gather(self, name: str) -> torch.Tensor:
        """Stage 3: every rank's masters hold an equal part of every tensor, the last one padded."""
        files = pt_files(self.path, "optim_states.pt")
        group, offset, shape = self._place(name, num_ranks=len(files))
        part = ceil(prod(shape) / len(files))
        pieces = []
        for file in files:
            masters = read_pt(file, mapped=True)["optimizer_state_dict"]["fp32_flat_groups"][group]
            pieces.append(masters[offset : offset + part].clone())
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
