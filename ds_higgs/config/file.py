"""Read, override and write the configuration; reports every mistake at once, with the nearest known key."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ds_higgs.config.section import Section
from ds_higgs.config.sections import Config
from ds_higgs.config.yaml_text import parse_yaml
from ds_higgs.errors import UserError
from ds_higgs.files import write_atomically

# The flags that people of this field type, and the keys they stand for.
SHORT_FLAGS = {
    "train_manifest": "data.train_manifest",
    "val_manifest": "data.val_manifest",
    "output_dir": "run.output_dir",
    "base_ckpt": "model.base",
    "batch_size": "data.batch_size",
    "lr": "optim.learning_rate",
    "epochs": "run.epochs",
    "grad_accum": "optim.gradient_accumulation_steps",
    "global_batch_size": "optim.global_batch_size",
    "warmup": "optim.warmup_steps",
    "wd": "optim.weight_decay",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "log_steps": "logging.log_steps",
    "val_steps": "eval.eval_steps",
    "save_steps": "checkpoint.save_steps",
}
# A resumed run must agree with its checkpoint in these sections' keys; everything else may change.
FIXED_KEYS = (
    "model.base",
    "model.revision",
    "train.mode",
    "train.only",
    "lora",
    "optim.type",
    "optim.whole_learning_rate",
    "optim.loraplus_lr_ratio",
    "optim.layer_decay",
    "zero.stage",
    "zero.precision",
)
# What a checkpoint means that was written before a key could be set.
FIXED_BEFORE = {
    "train.mode": "lora",
    "train.only": None,
    "optim.type": "adamw",
    "optim.whole_learning_rate": None,
    "optim.loraplus_lr_ratio": 1.0,
    "optim.layer_decay": 1.0,
}
# How pydantic calls the members of a union, beside the key.
BRANCHES = ("function-", "literal[", "tuple[", "dict[")
MAX_SHOWN = 120  # characters of a wrong value in a message


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """The validated configuration of a YAML file and overrides, which win.

    Args:
        path: YAML file with one mapping per section; None: overrides alone.
        overrides: "section.key" (or deeper, for zero.extra) to a value.

    Raises:
        UserError: with every mistake, each naming its key, what was found and what was expected.
    """
    values = {} if path is None else read_yaml(path)
    source = "command line" if path is None else f"{path} (with the command line's changes)"
    for key, value in overrides.items():
        _set(values, key, value)
    return validate_config(values, source=source)


def validate_config(values: Mapping[str, Any], *, source: str) -> Config:
    """The configuration that `values` hold, by section.

    Raises:
        UserError: with every mistake, each naming its key; `source` is where the values come from.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError.from_problems(
            f"{source}: the configuration is wrong", [_describe(one) for one in error.errors()]
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, is not UTF-8, is no YAML (with the line), repeats a key or holds no mapping.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (expected a YAML configuration)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected one mapping per section (run, model, data, ...), found {_kind(values)}")
    return values


def write_config(config: Config, path: Path) -> None:
    """Write the whole resolved configuration, paths made absolute: `train -c` of it reproduces the run."""
    values = yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)
    write_atomically(path, f"# ds-higgs train -c {path}\n{values}".encode())


def resolved(config: Config) -> dict[str, Any]:
    """The configuration as plain values, with absolute paths."""
    absolute = {section: _with_absolute_paths(model) for section, model in config}
    if Path(config.model.base).exists():
        absolute["model"]["base"] = str(Path(config.model.base).absolute())
    return Config.model_validate(absolute).model_dump(mode="json")


def _with_absolute_paths(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, Section):
        return {value.key_of(field): _with_absolute_paths(one) for field, one in value}
    return tuple(map(_with_absolute_paths, value)) if isinstance(value, tuple) else value


def fixed_values(config: Config) -> dict[str, Any]:
    """What a resumed run may not change, by key."""
    values = resolved(config)
    found: dict[str, Any] = {}
    for key in FIXED_KEYS:
        section, _, name = key.partition(".")
        found |= {key: values[section][name]} if name else {f"{section}.{one}": v for one, v in values[section].items()}
    return found


def known_keys() -> Iterator[tuple[str, Any, str]]:
    """Every "section.key" with its default (None where there is none) and its description."""
    for section, field in Config.model_fields.items():
        model: type[Section] = field.annotation  # type: ignore[assignment]
        for name, info in model.model_fields.items():
            yield (
                f"{section}.{model.key_of(name)}",
                None if info.is_required() else info.get_default(call_default_factory=True),
                str(info.description),
            )


def parse_value(text: str) -> Any:
    """A command-line value as YAML reads it: numbers, true / false, null, lists, else the text itself.

    Raises:
        UserError: for YAML that cannot be a value, such as a mapping that repeats a key.
    """
    try:
        return parse_yaml(text, "the value")
    except yaml.YAMLError:
        return text


def nearest_key(key: str) -> str | None:
    """The known key that `key` most likely means."""
    known = [name for name, _, _ in known_keys()]
    section, _, name = key.partition(".")
    same_name = [one for one in known if one.split(".")[1] == (name or section)]
    matches = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        values[parent] = dict(child) if isinstance(child, dict) else {}
        values = values[parent]
    values[last] = value


def _describe(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(BRANCHES))
    if error["type"] == "extra_forbidden":
        near = nearest_key(key)
        return f"{key}: unknown key" + (f"; did you mean {near}?" if near and key.count(".") == 1 else "")
    if error["type"] == "missing":
        return f"{key}: missing" + _description(key)
    if error["type"] == "secret":
        return f"{key}.{error['msg']}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (found {_shown(error['input'])})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... of {len(text)} characters"


def _description(key: str) -> str:
    descriptions = {name: text for name, _, text in known_keys()}
    if key in descriptions:
        return f" ({descriptions[key]})"
    required = [name for name, default, _ in known_keys() if name.startswith(key + ".") and _is_required(name)]
    return f" (needs {', '.join(required)})" if required else ""


def _is_required(key: str) -> bool:
    section, name = key.split(".")
    model: type[Section] = Config.model_fields[section].annotation  # type: ignore[assignment]
    return any(info.is_required() for field, info in model.model_fields.items() if model.key_of(field) == name)


def _kind(value: Any) -> str:
    return {type(None): "nothing", list: "a list"}.get(type(value), f"a {type(value).__name__}")
