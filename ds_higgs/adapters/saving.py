"""What a run has trained, an adapter in PEFT format or weights of the base, written whole or not at all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from safetensors import SafetensorError

from ds_higgs.adapters.from_checkpoint import MODULE_PREFIX
from ds_higgs.adapters.record import AdapterRecord
from ds_higgs.adapters.whole import WholeInfo, write_whole
from ds_higgs.checkpoint.host_copies import HostCopies
from ds_higgs.checkpoint.weights import CheckpointWeights
from ds_higgs.files import replaced_whole
from ds_higgs.job import distributed
from ds_higgs.model.loading import DTYPES, HiggsAudioModel
from ds_higgs.model.trained import TrainMode, trained_shapes
from ds_higgs.model.weight_files import Shapes


def save_trained(
    engine: DeepSpeedEngine, folder: Path, *, mode: TrainMode, base: str, revision: str | None, record: AdapterRecord
) -> None:
    """Write what the engine trains to `folder`, replacing it. Every rank calls this; rank 0 writes.

    Args:
        base: folder or hub id of the base checkpoint that it belongs to; revision: of the hub repository.
        record: what made it; it is kept beside the weights.

    Raises:
        OSError: on every rank, where it could not be written.
    """
    model = engine.module.peft_model
    partitioned = engine.zero_optimization_stage() == 3
    if isinstance(model, PeftModel):
        _name_base(model, base, revision)
        _save_adapter(model, folder, record, partitioned=partitioned)
    else:
        _save_whole(model, folder, record, WholeInfo(mode=mode, base=base, revision=revision), partitioned=partitioned)


@dataclass(frozen=True)
class HostWeights:
    """What a run trains, by the model's own names, on a disk or in CPU memory: each is read when it is asked for."""

    shapes: Shapes
    dtype: torch.dtype
    read: Callable[[str], torch.Tensor]

    @classmethod
    def in_files(cls, weights: CheckpointWeights) -> "HostWeights":
        """Those of a checkpoint, in the precision of the run."""
        dtype = DTYPES[weights.marker.precision]
        shapes = {name.removeprefix(MODULE_PREFIX): shape for name, shape in weights.shapes.items()}
        return cls(shapes, dtype, lambda name: weights.read(MODULE_PREFIX + name).to(dtype, copy=True))

    @classmethod
    def copied(cls, engine: DeepSpeedEngine, copies: HostCopies) -> "HostWeights":
        """Those of the engine as they are now, on rank 0; nothing on the others, which call it too.

        Args:
            copies: the CPU memory that they lie in.
        """
        found: dict[str, torch.Tensor] = {}
        partitioned = engine.zero_optimization_stage() == 3
        for name, weight in _gathered(engine.module.peft_model, partitioned=partitioned):
            if distributed.is_main_rank():
                found |= copies.copy({name: weight})
        shapes = {name: tuple(weight.shape) for name, weight in found.items()}
        return cls(shapes, engine.module.peft_model.dtype, found.__getitem__)


def save_from_host(
    model: PeftModel | HiggsAudioModel,
    weights: HostWeights,
    folder: Path,
    *,
    mode: TrainMode,
    base: str,
    revision: str | None,
    record: AdapterRecord,
) -> None:
    """`save_trained` of weights that are not the model's: by rank 0 alone, while `model` may be trained on.

    Raises:
        OSError: it could not be written.
    """
    tensors = ((name, weights.read(name)) for name in weights.shapes)

    def write_whole_weights(unfinished: Path) -> None:
        info = WholeInfo(mode=mode, base=base, revision=revision)
        write_whole(unfinished, info, tensors, shapes=weights.shapes, dtype=weights.dtype)

    if isinstance(model, PeftModel):
        _name_base(model, base, revision)
        _write(folder, record, lambda unfinished: _write_adapter(model, unfinished, dict(tensors)))
    else:
        _write(folder, record, write_whole_weights)


def _name_base(model: PeftModel, base: str, revision: str | None) -> None:
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path, config.revision = base, revision


def _write_adapter(model: PeftModel, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """As PEFT does; `state_dict`: of the trained weights, None for those that `model` has."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=state_dict)


def _save_adapter(model: PeftModel, folder: Path, record: AdapterRecord, *, partitioned: bool) -> None:
    """Of ZeRO-3, rank 0 collects it in CPU memory, one tensor at a time: parts trained whole may be large."""
    collected = None
    if partitioned:
        is_main = distributed.is_main_rank()
        coming = ((name, weight.to("cpu", copy=True) if is_main else None) for name, weight in _gathered(model))
        collected = {name: weight for name, weight in coming if weight is not None}

    def write(unfinished: Path) -> None:
        _write_adapter(model, unfinished, collected)

    distributed.on_main_rank(lambda: _write(folder, record, write))


def _save_whole(
    model: HiggsAudioModel, folder: Path, record: AdapterRecord, info: WholeInfo, *, partitioned: bool
) -> None:
    """One tensor at a time: with ZeRO-3 all of them may be more than a rank can hold."""
    coming = _gathered(model, partitioned=partitioned)

    def write(unfinished: Path) -> None:
        write_whole(unfinished, info, coming, shapes=trained_shapes(model), dtype=model.dtype)

    def write_and_gather_the_rest() -> None:
        try:
            _write(folder, record, write)
        finally:
            _exhaust(coming)  # a failed write must not leave the other ranks waiting in a gather

    if not distributed.is_main_rank():
        _exhaust(coming)
    distributed.on_main_rank(write_and_gather_the_rest)


def _gathered(model: PeftModel | HiggsAudioModel, *, partitioned: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None, enabled=partitioned):
                yield name, parameter.detach()


def _exhaust(iterator: Iterator[object]) -> None:
    for _ in iterator:
        pass


def _write(folder: Path, record: AdapterRecord, write: Callable[[Path], None]) -> None:
    try:
        with replaced_whole(folder) as unfinished:
            write(unfinished)
            record.write(unfinished)
    except (OSError, SafetensorError) as error:  # raised on every rank, and safetensors' names no file
        raise OSError(f"rank 0: could not save {folder}: {error}") from error
