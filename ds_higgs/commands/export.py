"""Exports what a run has learned: a PEFT adapter or a merged model, in boson's format or that of transformers."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import yaml

from ds_higgs import hub
from ds_higgs.adapters.card import BASE_LICENCE, describe, write_card, write_command, write_usage
from ds_higgs.adapters.merging import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, merge_adapter, read_adapter_config
from ds_higgs.adapters.native import save_native_adapter, save_native_model
from ds_higgs.adapters.native_processor import save_native_processor
from ds_higgs.adapters.opening import Adapter, open_adapter
from ds_higgs.adapters.publishing import check_may_be_published, copy_samples, public_name, without_places, write_legal
from ds_higgs.adapters.scaling import scale_adapter
from ds_higgs.adapters.whole import WholeWeights
from ds_higgs.adapters.whole_model import write_whole_model
from ds_higgs.errors import UserError
from ds_higgs.files import replaced_whole, write_json
from ds_higgs.job.logs import phase
from ds_higgs.model.loading import (
    DTYPES,
    load_model,
    load_tokenizer,
    read_model_config,
    resolve_base,
)

Format = Literal["original", "transformers"]


@dataclass(frozen=True)
class Publishing:
    """repository: OWNER/NAME on the hub. licence_files: to add to those that the base's folder has."""

    repository: str | None = None
    private: bool = False
    licence_files: tuple[Path, ...] = ()


FRAMES_PER_SECOND = 25.0  # of the released audio tokenizer
# What a merged model takes over from its base, beside config and weights: tokenizer, codec, licence.
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "LICENSE*", "codec")


def export(
    source: Path,
    out: Path,
    *,
    step: int | None = None,
    merge: bool = False,
    precision: Literal["bf16", "fp32"] = "bf16",
    layout: Format = "original",
    base: str | None = None,
    licence: str = BASE_LICENCE,
    lora_scale: float = 1.0,
    publish: Publishing | None = None,
) -> None:
    """Write the adapter of `source`, or the base merged with it, to the new folder `out`; whole or not at all.

    Args:
        source: a run's folder, one of its checkpoints, or an adapter's folder.
        step: of a run; None: the final adapter, or the newest where that is newer.
        precision: of a merged model.
        base: folder or hub id, where the one that the adapter names is elsewhere now.
        lora_scale: how much of the adapter: 0 is the base, 1 what was trained.
        publish: where to on the hub, once it is whole; None: nowhere.

    Raises:
        UserError: for what is missing or does not fit, and for an `out` that has something in it.
    """
    publish = publish or Publishing()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; expected a new or empty folder")
    with (
        replaced_whole(out) as unfinished,
        open_adapter(source, step=step, base=base) as opened,
        _scaled(opened, lora_scale) as adapter,
    ):
        if adapter.whole is not None:
            if not merge:
                mode = adapter.whole.mode
                raise UserError(f"{source}: train.mode {mode} trained the base's own weights, no adapter: add --merge")
            _export_whole(adapter, adapter.whole, unfinished, dtype=DTYPES[precision], layout=layout, scale=lora_scale)
        elif merge:
            _export_merged(adapter, unfinished, dtype=DTYPES[precision], layout=layout)
        else:
            _export_adapter(adapter, unfinished, layout=layout)
        _make_presentable(adapter, unfinished, licence, publish)
        title = publish.repository or out.resolve().name
        card = _build_card(adapter, unfinished, title=title, merged=merge, layout=layout, licence=licence)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if (prompt := adapter.prompt()) is not None:
            prompt.write(unfinished)
    if publish.repository is not None:
        with phase(f"sending it to {publish.repository}"):
            hub.upload(out, publish.repository, private=publish.private)


def _make_presentable(adapter: Adapter, out: Path, licence: str, publish: Publishing) -> None:
    """Licences, notice and samples."""
    licences = []
    if licence == BASE_LICENCE:
        licences = write_legal(out, adapter.base, adapter.revision, publish.licence_files)
        if publish.repository is not None:
            check_may_be_published(publish.repository, adapter.base, licences)
    copy_samples(adapter.source, None if adapter.record is None else adapter.record.step, out)


@contextmanager
def _scaled(adapter: Adapter, scale: float) -> Iterator[Adapter]:
    """The adapter, or a copy of it that adds `scale` times as much to the base."""
    if scale == 1 or adapter.whole is not None:  # whole weights are scaled as they are written
        yield adapter
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = resolve_base(adapter.base, adapter.revision)
        model = load_adapter(load_model(base, dtype=torch.float32), adapter.folder)
        scale_adapter(model, scale)
        model.save_pretrained(str(folder))
        yield replace(adapter, folder=folder)


def _export_adapter(adapter: Adapter, out: Path, *, layout: Format) -> None:
    if layout == "transformers":
        save_native_adapter(adapter.folder, out, base=adapter.base)
        return
    shutil.copyfile(adapter.folder / ADAPTER_WEIGHTS, out / ADAPTER_WEIGHTS)
    config = read_adapter_config(adapter.folder)
    write_json(out / ADAPTER_CONFIG, config | {"base_model_name_or_path": adapter.base, "revision": adapter.revision})


def _export_merged(adapter: Adapter, out: Path, *, dtype: torch.dtype, layout: Format) -> None:
    base = resolve_base(adapter.base, adapter.revision)
    stored = read_model_config(base).torch_dtype or torch.float32
    wider = torch.promote_types(stored, dtype)  # what was trained whole comes in the precision of the model
    model = merge_adapter(load_adapter(load_model(base, dtype=wider), adapter.folder), dtype=dtype)
    model.config.torch_dtype = dtype
    model.config._name_or_path = ""  # a place on this machine
    tokenizer = load_tokenizer(base)
    if layout == "transformers":
        save_native_model(model, out, eos_token_id=tokenizer.convert_tokens_to_ids("<|eot_id|>"))
    else:
        model.save_pretrained(out)
    _complete_model(base, out, layout=layout)


def _export_whole(
    adapter: Adapter, whole: WholeWeights, out: Path, *, dtype: torch.dtype, layout: Format, scale: float
) -> None:
    base = resolve_base(adapter.base, adapter.revision)
    end_of_turn = load_tokenizer(base).convert_tokens_to_ids("<|eot_id|>") if layout == "transformers" else None
    where = str(adapter.source)
    write_whole_model(base, whole, out, dtype=dtype, eos_token_id=end_of_turn, scale=scale, where=where)
    _complete_model(base, out, layout=layout)


def _complete_model(base: Path, out: Path, *, layout: Format) -> None:
    """Put beside a model's weights what speaking with it needs."""
    for pattern in _COMPANIONS:
        for path in base.glob(pattern):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, out / path.name)
    if layout == "transformers":
        save_native_processor(out, tokenizer=load_tokenizer(base), config=read_model_config(base))


def _build_card(adapter: Adapter, out: Path, *, title: str, merged: bool, layout: Format, licence: str) -> str:
    """The card of what lies in `out`; it names no place on this machine."""
    facts: list[str] = []
    config = ""
    if adapter.record is not None:
        facts = describe(adapter.record, num_codebooks=8, frames_per_second=FRAMES_PER_SECOND)
        config = yaml.safe_dump(without_places(adapter.record.config), sort_keys=False, allow_unicode=True)
    revision = adapter.revision if layout == "original" else None
    base = public_name(adapter.base)
    return write_card(
        title=title,
        base=base,
        revision=revision,
        licence=licence,
        command=write_command(title=Path(title).name, base=base, revision=revision, merged=merged)
        if layout == "original"
        else "",
        usage=write_usage(title=title, base=base, revision=revision, merged=merged, layout=layout),
        merged=merged,
        facts=facts,
        config=config,
        mode="lora" if adapter.whole is None else adapter.whole.mode,
        samples=[str(path.relative_to(out)) for path in sorted(out.glob("samples/*.wav"))],
    )
