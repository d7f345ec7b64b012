"""Weights of the base that a run trained whole (train.mode audio_path, full): written, opened, put on their base.

A folder of them holds the trained tensors alone, under the base's own names; all else is the base's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import PositiveInt

from ds_higgs.adapters.from_checkpoint import MODULE_PREFIX
from ds_higgs.adapters.record import StoredValues
from ds_higgs.checkpoint.weights import CheckpointWeights
from ds_higgs.errors import UserError
from ds_higgs.files import read_json, write_json
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.split_weights import gathered, whole_shape
from ds_higgs.model.trained import TrainMode
from ds_higgs.model.weight_files import Shapes, StoredWeights, write_weights

INFO_FILE = "trained_weights.json"
STEM = "trained"


class WholeInfo(StoredValues):
    """What trained_weights.json says: how the weights were chosen, and the base that they belong to."""

    mode: TrainMode
    base: str
    revision: str | None
    format_version: PositiveInt = 1

    @classmethod
    def read(cls, folder: Path) -> "WholeInfo":
        """Raises UserError for a file that is not what was written."""
        return cls.parse(read_json(folder / INFO_FILE), where=str(folder / INFO_FILE))


@dataclass(frozen=True)
class WholeWeights:
    """Trained weights by the base's names, on a disk: each is read when it is asked for."""

    mode: TrainMode
    shapes: Shapes
    read: Callable[[str], torch.Tensor]

    @classmethod
    def in_folder(cls, folder: Path) -> "WholeWeights":
        """Those that `save_whole` wrote.

        Raises:
            UserError: for what is missing or damaged.
        """
        stored = StoredWeights.open(folder, STEM)
        return cls(WholeInfo.read(folder).mode, stored.shapes, stored.read)

    @classmethod
    def in_checkpoint(cls, checkpoint: Path, *, mode: TrainMode) -> "WholeWeights":
        """Raises UserError if the checkpoint is incomplete or damaged."""
        weights = CheckpointWeights.open(checkpoint)
        shapes = {name.removeprefix(MODULE_PREFIX): shape for name, shape in weights.shapes.items()}
        return cls(mode, shapes, lambda name: weights.read(MODULE_PREFIX + name))

    def check_fit(self, shapes: Shapes, *, where: str) -> None:
        """Compare with the names and shapes of a base's weights.

        Raises:
            UserError: naming what has no place in them; `where` is what these weights are of.
        """
        problems = [
            f"{name}: shape {tuple(shape)}, the base has {tuple(shapes[name]) if name in shapes else 'none'}"
            for name, shape in self.shapes.items()
            if name not in shapes or tuple(shapes[name]) != tuple(shape)
        ]
        if problems:
            raise UserError.from_problems(f"{where}: the weights do not fit the base checkpoint:", problems[:12])

    def scaled(self, name: str, of_base: torch.Tensor, scale: float) -> torch.Tensor:
        """A trained tensor, or a point on the straight line from the base's (0) through it (1), in fp32."""
        trained = self.read(name)
        if scale == 1:
            return trained
        return torch.lerp(of_base.float(), trained.to(of_base.device, torch.float32), scale)

    @torch.no_grad()
    def put_on(self, model: HiggsAudioModel, *, scale: float = 1.0, where: str) -> None:
        """Give `model`, a base, the trained values, in place.

        Raises:
            UserError: it is of another architecture.
        """
        weights = dict(model.named_parameters())
        self.check_fit({name: whole_shape(weight) for name, weight in weights.items()}, where=where)
        for name in self.shapes:
            with gathered([weights[name]], changed=True):
                weights[name].copy_(self.scaled(name, weights[name], scale))


def write_whole(
    folder: Path, info: WholeInfo, tensors: Iterable[tuple[str, torch.Tensor]], *, shapes: Shapes, dtype: torch.dtype
) -> None:
    """Write trained weights into `folder` as they come, in the order of `shapes`."""
    write_json(folder / INFO_FILE, info.model_dump())
    write_weights(folder, tensors, shapes=shapes, dtype=dtype, stem=STEM)
