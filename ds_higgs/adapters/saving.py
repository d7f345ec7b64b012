"""The trained adapter in PEFT format, written whole or not at all."""

from pathlib import Path

import deepspeed
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from safetensors import SafetensorError

from ds_higgs.adapters.record import AdapterRecord
from ds_higgs.files import replaced_whole
from ds_higgs.job import distributed


def save_adapter(
    engine: DeepSpeedEngine, folder: Path, *, base: str, revision: str | None, record: AdapterRecord
) -> None:
    """Write the adapter that the engine trains to `folder`, replacing it. Every rank calls this; rank 0 writes.

    Args:
        base: folder or hub id of the base checkpoint, for adapter_config.json; revision: of the hub repository.
        record: what made the adapter; it is kept beside the weights.
    """
    model: PeftModel = engine.module.peft_model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    partitioned = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(trainable, modifier_rank=None, enabled=partitioned):
        distributed.on_main_rank(lambda: _write(model, folder, base=base, revision=revision, record=record))


def _write(model: PeftModel, folder: Path, *, base: str, revision: str | None, record: AdapterRecord) -> None:
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base
    config.revision = revision
    try:
        with replaced_whole(folder) as unfinished:
            model.save_pretrained(str(unfinished), safe_serialization=True, save_embedding_layers=False)
            record.write(unfinished)
    except (OSError, SafetensorError) as error:  # raised on every rank, and safetensors' names no file
        raise OSError(f"rank 0: could not save the adapter {folder}: {error}") from error
