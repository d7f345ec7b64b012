"""What a run has trained so far, an adapter in PEFT format or weights of the base, written whole or not at all."""

from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from safetensors import SafetensorError

from ds_higgs.adapters.record import AdapterRecord
from ds_higgs.adapters.whole import WholeInfo, write_whole
from ds_higgs.files import replaced_whole
from ds_higgs.job import distributed
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.trained import TrainMode, trained_shapes


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
        config = model.peft_config[model.active_adapter]
        config.base_model_name_or_path, config.revision = base, revision
        _save_adapter(model, folder, record, partitioned=partitioned)
    else:
        _save_whole(model, folder, record, WholeInfo(mode=mode, base=base, revision=revision), partitioned=partitioned)


def _save_adapter(model: PeftModel, folder: Path, record: AdapterRecord, *, partitioned: bool) -> None:
    def write(unfinished: Path) -> None:
        model.save_pretrained(str(unfinished), safe_serialization=True, save_embedding_layers=False)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(trainable, modifier_rank=None, enabled=partitioned):
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


def _gathered(model: HiggsAudioModel, *, partitioned: bool) -> Iterator[tuple[str, torch.Tensor]]:
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
