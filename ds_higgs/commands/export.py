"""Exports what a run has learned: a PEFT adapter or a merged model, in boson's format or that of transformers."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from safetensors.torch import save_file

from ds_higgs.adapters.card import BASE_LICENCE, TrainingFacts, describe, write_card
from ds_higgs.adapters.from_checkpoint import read_adapter_weights
from ds_higgs.adapters.merging import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, merge_adapter, read_adapter_config
from ds_higgs.adapters.native import save_native_adapter, save_native_model
from ds_higgs.errors import UserError
from ds_higgs.files import replaced_whole, write_json
from ds_higgs.hub import ORIGINAL_REVISION, RELEASED_REPOSITORY
from ds_higgs.model.loading import (
    HiggsAudioModel,
    build_meta_model,
    load_model,
    load_tokenizer,
    read_model_config,
    resolve_base,
)
from ds_higgs.model.lora import apply_lora
from ds_higgs.run_folder import RunFolder

Format = Literal["original", "transformers"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FRAMES_PER_SECOND = 25.0  # of the released audio tokenizer
# What a merged model takes over from its base, beside config and weights: tokenizer, codec, licence.
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "LICENSE*", "codec")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter on disk, the base it was made for, and the run it comes from, where that is known."""

    folder: Path
    base: str
    revision: str | None
    run: RunFolder | None
    step: int | None


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
) -> None:
    """Write the adapter of `source`, or the base merged with it, to the new folder `out`; whole or not at all.

    Args:
        source: a run's folder, one of its checkpoints, or an adapter's folder.
        step: of a run; None: the final adapter, else the newest.
        precision: of a merged model.
        base: folder or hub id, where the one that the adapter names is elsewhere now.

    Raises:
        UserError: for what is missing or does not fit, and for an `out` that has something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; expected a new or empty folder")
    with replaced_whole(out) as unfinished, open_adapter(source, step=step, base=base) as adapter:
        if merge:
            _export_merged(adapter, unfinished, dtype=DTYPES[precision], layout=layout)
        else:
            _export_adapter(adapter, unfinished, layout=layout)
        card = _build_card(adapter, title=out.resolve().name, merged=merge, layout=layout, licence=licence)
        (unfinished / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def open_adapter(source: Path, *, step: int | None = None, base: str | None = None) -> Iterator[Adapter]:
    """The adapter that `source` means (a run, a checkpoint or an adapter's folder), while open."""
    if (source / ADAPTER_CONFIG).is_file():
        yield _describe_adapter(source, _run_above(source), _step_of(source), base)
    elif source.parent.name == "checkpoints":
        run = RunFolder.open(source.parent.parent)
        with tempfile.TemporaryDirectory() as folder:
            _write_checkpoint_adapter(source, run, Path(folder))
            yield _describe_adapter(Path(folder), run, _step_of(source), base)
    else:
        run = RunFolder.open(source)
        found = run.find_adapter(step)
        yield _describe_adapter(found, run, _step_of(found), base)


def _write_checkpoint_adapter(checkpoint: Path, run: RunFolder, out: Path) -> None:
    """Write the adapter in a DeepSpeed checkpoint of `run` to the folder `out`, as PEFT does."""
    save_file(read_adapter_weights(checkpoint), out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    base = run.config["model"]["base"], run.config["model"]["revision"]
    model = apply_lora(build_meta_model(read_model_config(resolve_base(*base))), **run.config["lora"])
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path, config.revision = base
    config.inference_mode = True
    config.auto_mapping = {"base_model_class": HiggsAudioModel.__name__, "parent_library": HiggsAudioModel.__module__}
    config.save_pretrained(str(out))


def _run_above(adapter: Path) -> RunFolder | None:
    """The run of RUN/adapters/step-00000500; None for an adapter that is elsewhere."""
    try:
        return RunFolder.open(adapter.resolve().parent.parent)
    except UserError:
        return None


def _step_of(folder: Path) -> int | None:
    return int(folder.name.removeprefix("step-")) if folder.name.startswith("step-") else None


def _describe_adapter(folder: Path, run: RunFolder | None, step: int | None, base: str | None) -> Adapter:
    config = read_adapter_config(folder)
    named, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    if base is not None and base != named:
        named, revision = base, None
    if not named:
        raise UserError(f"{folder / ADAPTER_CONFIG}: does not name its base checkpoint; name it with --base")
    if named == RELEASED_REPOSITORY:
        revision = revision or ORIGINAL_REVISION
    return Adapter(folder, base=named, revision=revision, run=run, step=step)


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
    model = merge_adapter(load_adapter(load_model(base, dtype=stored), adapter.folder), dtype=dtype)
    model.config.torch_dtype = dtype
    tokenizer = load_tokenizer(base)
    if layout == "transformers":
        save_native_model(model, out, eos_token_id=tokenizer.convert_tokens_to_ids("<|eot_id|>"))
    else:
        model.save_pretrained(out)
    _copy_companions(base, out)


def _copy_companions(base: Path, out: Path) -> None:
    for pattern in _COMPANIONS:
        for path in base.glob(pattern):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, out / path.name)


def _build_card(adapter: Adapter, *, title: str, merged: bool, layout: Format, licence: str) -> str:
    facts: list[str] = []
    config = ""
    if adapter.run is not None:
        training = TrainingFacts.read(adapter.run, adapter.step)
        facts = describe(training, num_codebooks=8, frames_per_second=FRAMES_PER_SECOND)
        config = yaml.safe_dump(adapter.run.config, sort_keys=False, allow_unicode=True)
    return write_card(
        title=title,
        base=adapter.base,
        revision=adapter.revision if layout == "original" else None,
        licence=licence,
        usage=_usage(adapter, title, merged=merged, layout=layout),
        merged=merged,
        facts=facts,
        config=config,
    )


def _usage(adapter: Adapter, title: str, *, merged: bool, layout: Format) -> str:
    revision = f', revision="{adapter.revision}"' if adapter.revision and layout == "original" else ""
    if layout == "transformers":
        model_class, module = "HiggsAudioV2ForConditionalGeneration", "transformers"
    else:
        model_class, module = "HiggsAudioModel", "boson_multimodal.model.higgs_audio"
    loaded = f'"{title}"' if merged else f'"{adapter.base}"{revision}'
    lines = [f"from {module} import {model_class}", f"model = {model_class}.from_pretrained({loaded})"]
    if not merged:
        lines = ["import torch.distributed.tensor  # before PEFT", "from peft import PeftModel", *lines]
        lines.append(f'model = PeftModel.from_pretrained(model, "{title}")')
    return "\n".join(lines)
