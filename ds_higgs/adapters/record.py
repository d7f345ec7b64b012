"""What an adapter's folder tells about itself: the step, the seed, the losses and the configuration that it is of."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from typing_extensions import Self

from ds_higgs.errors import UserError
from ds_higgs.files import read_json, write_json
from ds_higgs.run_folder import RECORD_FILE, read_stored_config

if TYPE_CHECKING:
    from ds_higgs.config import Config

logger = logging.getLogger(__name__)

LOSSES = ("loss", "text_loss", "audio_loss")


class StoredValues(BaseModel):
    """Values that this package wrote to a small file: frozen, and nothing unknown among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Check values that come from the file `where`.

        Raises:
            UserError: naming what is not as it was written.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise UserError.from_problems(f"{where}: not what ds-higgs wrote there", problems) from None


class AdapterRecord(StoredValues):
    """What made an adapter, up to the step that it was saved at.

    samples, audio_targets: learned from, every pass counted; an audio target is one codebook of one frame. None: not
        known.
    losses: by name, of the last validation; of the last training step where there was none.
    config: of the run, resolved, as plain values.
    """

    step: NonNegativeInt
    seed: NonNegativeInt
    samples: NonNegativeInt
    audio_targets: NonNegativeInt | None
    losses: dict[str, float]
    losses_are_of: Literal["validation", "training"]
    config: dict[str, Any]

    @classmethod
    def of(cls, position: Mapping[str, Any], config: dict[str, Any], *, where: str) -> "AdapterRecord":
        """The record for a run's position, as it stands in a checkpoint, and its configuration.

        Raises:
            UserError: naming what is not as it was written; `where` is where both come from.
        """
        values = {
            "step": position.get("step"),
            "seed": config.get("run", {}).get("seed"),
            "samples": position.get("samples_seen"),
            "audio_targets": position.get("audio_targets_seen"),
            "losses": position.get("losses", {}),
            "losses_are_of": position.get("losses_are_of", "training"),
            "config": config,
        }
        return cls.parse(values, where=where)

    def write(self, folder: Path) -> None:
        """Put the record into an adapter's folder."""
        write_json(folder / RECORD_FILE, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """Plain values; losses that are not finite as strings, which is how JSON can hold and `parse` reads them."""
        losses = {name: value if math.isfinite(value) else str(value) for name, value in self.losses.items()}
        return self.model_dump() | {"losses": losses}

    @classmethod
    def read(cls, folder: Path) -> "AdapterRecord | None":
        """The record in an adapter's folder; None where it brings none, and, with a warning, where that is damaged."""
        path = folder / RECORD_FILE
        if not path.exists():
            return None
        try:
            return cls.parse(read_json(path), where=str(path))
        except UserError as error:
            logger.warning("%s; going on without it", error)
            return None

    def typed_config(self, *, where: str) -> "Config":
        """The configuration, validated.

        Raises:
            UserError: where this version does not know it; `where` names its place.
        """
        return read_stored_config(self.config, where=where)
