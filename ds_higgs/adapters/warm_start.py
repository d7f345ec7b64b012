"""A run that starts from what another one trained: put on its base before it is chosen which weights learn."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from ds_higgs.adapters.merging import ADAPTER_WEIGHTS, load_adapter, merge_adapter
from ds_higgs.adapters.opening import Adapter, open_adapter
from ds_higgs.adapters.whole import WholeWeights
from ds_higgs.errors import UserError
from ds_higgs.model.loading import HiggsAudioModel, open_base_weights
from ds_higgs.model.split_weights import gathered, whole_shape
from ds_higgs.model.trained import TrainMode, select_weights

_OF_LORA = re.compile(r"\.lora_.*$")


def check_source(source: Path) -> None:
    """Raises UserError where there is nothing to start from."""
    if not source.exists():
        raise UserError(f"train.from: {source} does not exist; expected a run, a checkpoint, an adapter or a model")


def start_from(model: HiggsAudioModel, source: Path, *, mode: TrainMode, only: str | None) -> HiggsAudioModel:
    """Give `model`, a base, what `source` trained: a run, a checkpoint, what a run handed out, or an exported model.

    An adapter is merged, each weight rounded once to the model's precision.

    Args:
        mode, only: what the run will train: nothing else may change, or what it hands out would lack it.

    Raises:
        UserError: for what is missing, damaged or of another architecture, and where weights would change that the
            run does not train.
    """
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trained = set(select_weights(model, mode=mode, only=only))
    if (source / "config.json").is_file():
        stored = open_base_weights(source)
        _put_whole_on(model, WholeWeights("full", stored.shapes, stored.read), trained, source)
        return model
    with open_adapter(source) as found:
        if found.whole is not None:
            _put_whole_on(model, found.whole, trained, source)
            return model
        _check_all_are_trained(set(_changed_by(found)) - trained, source)
        merged = merge_adapter(load_adapter(model, found.folder), dtype=model.dtype).train()
    for name, parameter in merged.named_parameters():  # PEFT has frozen them all
        parameter.requires_grad_(learning[name])
    return merged


def _put_whole_on(model: HiggsAudioModel, whole: WholeWeights, trained: set[str], source: Path) -> None:
    of_base = dict(model.named_parameters())
    where = f"train.from: {source}"
    whole.check_fit({name: whole_shape(weight) for name, weight in of_base.items()}, where=where)
    kept = (name for name in whole.shapes if name not in trained)
    _check_all_are_trained({name for name in kept if not _same(whole.read(name), of_base[name])}, source)
    whole.put_on(model, where=where)


def _same(weight: torch.Tensor, of_base: torch.Tensor) -> bool:
    with gathered([of_base]):
        return torch.equal(weight.to(of_base), of_base)


def _changed_by(adapter: Adapter) -> Iterator[str]:
    """The weights that an adapter adds to or replaces."""
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - safe_open is no mapping
            yield _OF_LORA.sub(".weight", name.removeprefix("base_model.model."))


def _check_all_are_trained(left_out: set[str], source: Path) -> None:
    if left_out:
        shown = ", ".join(sorted(left_out)[:3]) + ", ..." * (len(left_out) > 3)
        raise UserError(
            f"train.from: {source} changes weights that this run does not train, and what the run hands out would "
            f"lack them ({len(left_out)}: {shown}); expected train.mode full, or a base that has them: "
            f"ds-higgs export {source} --merge --out DIR, then model.base: DIR"
        )
