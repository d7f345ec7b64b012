"""What users name as an adapter: a run, one of its checkpoints or an adapter's folder; opened, with what made it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from ds_higgs.adapters.from_checkpoint import read_adapter_weights
from ds_higgs.adapters.merging import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from ds_higgs.adapters.record import LOSSES, AdapterRecord
from ds_higgs.adapters.trained_prompt import TrainedPrompt
from ds_higgs.adapters.whole import INFO_FILE, WholeInfo, WholeWeights
from ds_higgs.checkpoint.marker import MARKER_NAME
from ds_higgs.checkpoint.saving import STATE_NAME
from ds_higgs.errors import UserError
from ds_higgs.files import read_json
from ds_higgs.hub import ORIGINAL_REVISION, is_released
from ds_higgs.model.loading import (
    HiggsAudioModel,
    build_meta_model,
    read_model_config,
    resolve_base,
)
from ds_higgs.model.lora import apply_lora
from ds_higgs.run_folder import RunFolder

if TYPE_CHECKING:
    from ds_higgs.config import Config


@dataclass(frozen=True)
class Adapter:
    """What a run has trained, on disk, the base it was made for, and what made it, where that is known.

    folder: of a PEFT adapter; of whole weights what they are read from.
    source: what the user named.
    whole: weights that were trained themselves; None for a PEFT adapter.
    """

    folder: Path
    base: str
    revision: str | None
    record: AdapterRecord | None
    source: Path
    whole: WholeWeights | None = None

    def run_config(self) -> "Config | None":
        """The configuration that the adapter was trained with.

        Raises:
            UserError: where this version does not know it.
        """
        return None if self.record is None else self.record.typed_config(where=f"the configuration of {self.source}")

    def prompt(self) -> TrainedPrompt | None:
        """The form of prompt that it was trained in, where that is known."""
        if self.record is None:
            return TrainedPrompt.read(self.folder)
        return TrainedPrompt.of_run(self.record.config, where=f"the configuration of {self.source}")


@contextmanager
def open_adapter(source: Path, *, step: int | None = None, base: str | None = None) -> Iterator[Adapter]:
    """The adapter that `source` means (a run, a checkpoint or an adapter's folder), while open.

    Args:
        step: of a run; None: the final adapter, or the newest where that is newer.
        base: folder or hub id, where the one that the adapter names is elsewhere now.

    Raises:
        UserError: for what is missing or damaged.
    """
    is_saved = any((source / name).is_file() for name in (ADAPTER_CONFIG, INFO_FILE))
    if not is_saved and ((source / MARKER_NAME).is_file() or source.parent.name == "checkpoints"):
        with tempfile.TemporaryDirectory() as folder:
            yield _open_checkpoint(source, Path(folder), base)
        return
    found = source if is_saved else RunFolder.open(source).find_adapter(step)
    describe = _describe_whole if (found / INFO_FILE).is_file() else _describe_adapter
    yield describe(found, _record_of(found), source, base)


def _open_checkpoint(checkpoint: Path, folder: Path, base: str | None) -> Adapter:
    """What is in a checkpoint: weights stay where they are, an adapter is written to `folder` as PEFT does."""
    record = _record_of_checkpoint(checkpoint)
    run = record.typed_config(where=f"the configuration of {checkpoint}")
    if run.train.mode != "lora":
        named = _find_base(run.model.base, run.model.revision, base)
        whole = WholeWeights.in_checkpoint(checkpoint, mode=run.train.mode)
        return Adapter(checkpoint, *named, record=record, source=checkpoint, whole=whole)
    _write_checkpoint_adapter(checkpoint, run, folder)
    return _describe_adapter(folder, record, checkpoint, base)


def _write_checkpoint_adapter(checkpoint: Path, run: "Config", out: Path) -> None:
    save_file(read_adapter_weights(checkpoint), out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    base = run.model.base, run.model.revision
    model = apply_lora(build_meta_model(read_model_config(resolve_base(*base))), **run.lora.model_dump())
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path, config.revision = base
    config.inference_mode = True
    config.auto_mapping = {"base_model_class": HiggsAudioModel.__name__, "parent_library": HiggsAudioModel.__module__}
    config.save_pretrained(str(out))


def _record_of_checkpoint(checkpoint: Path) -> AdapterRecord:
    state = read_json(checkpoint / STATE_NAME)
    position: dict[str, Any] = state.get("position", {})
    if "losses" not in position and (run := _run_above(checkpoint)) is not None:  # written by an earlier version
        position |= _position_by_metrics(run, position["step"])
    return AdapterRecord.of(position, state.get("config", {}), where=str(checkpoint / STATE_NAME))


def _record_of(adapter: Path) -> AdapterRecord | None:
    """The adapter's own record; for one of an earlier version that is in its run's folder, what the run tells of it."""
    if (record := AdapterRecord.read(adapter)) is not None:
        return record
    run = _run_above(adapter)
    step = None if run is None else run.adapter_step(adapter)
    if run is None or step is None:
        return None
    return AdapterRecord.of(_position_by_metrics(run, step), run.config_values, where=str(run.path))


def _position_by_metrics(run: RunFolder, step: int) -> dict[str, Any]:
    """The position of a run at `step`, as its metrics tell it."""
    steps = [line for line in run.events("step") if line["step"] <= step and _counts(line)]
    evals = [line for line in run.events("eval") if line["step"] <= step]
    newest = (evals or steps or [{}])[-1]
    return {
        "step": step,
        "samples_seen": sum(line["num_samples"] for line in steps),
        "audio_targets_seen": sum(line["num_audio_targets"] for line in steps),
        "losses": {name: newest[name] for name in LOSSES if name in newest},
        "losses_are_of": "validation" if evals else "training",
    }


def _counts(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(key), int) for key in ("num_samples", "num_audio_targets"))


def _run_above(folder: Path) -> RunFolder | None:
    """The run of RUN/adapters/step-00000500; None for a folder that is elsewhere, or aside because it is superseded."""
    try:
        return RunFolder.open(folder.resolve().parent.parent)
    except UserError:
        return None


def _describe_adapter(folder: Path, record: AdapterRecord | None, source: Path, base: str | None) -> Adapter:
    config = read_adapter_config(folder)
    named, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    if not named and base is None:
        raise UserError(f"{folder / ADAPTER_CONFIG}: does not name its base checkpoint; name it with --base")
    return Adapter(folder, *_find_base(named, revision, base), record=record, source=source)


def _describe_whole(folder: Path, record: AdapterRecord | None, source: Path, base: str | None) -> Adapter:
    info = WholeInfo.read(folder)
    named = _find_base(info.base, info.revision, base)
    return Adapter(folder, *named, record=record, source=source, whole=WholeWeights.in_folder(folder))


def _find_base(named: str, revision: str | None, wanted: str | None) -> tuple[str, str | None]:
    """The base that is named, or where the user says that it is now; and its revision."""
    if wanted is not None and wanted != named:
        named, revision = wanted, None
    if is_released(named):
        revision = revision or ORIGINAL_REVISION
    return named, revision
