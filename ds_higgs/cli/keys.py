"""The part of `--help` that lists keys: those that a command reads, by section, with what they may hold."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import groupby
from typing import Any

from ds_higgs.config.allowed import allowed_values
from ds_higgs.config.file import SHORT_FLAGS, known_keys
from ds_higgs.config.sections import Config

# By every configuration, and what help says of it.
_NEEDED = {
    "model.base": "needed",
    "data.train_manifest": "needed, unless data.train is given",
    "run.output_dir": "needed",
}
_SAMPLES = ("model.base", "model.revision", "data.*", "!data.num_workers", "!data.batch_size")
_DEEPSPEED = (
    "zero.*",
    "logging.*",
    "!logging.log_steps",
    "!logging.progress",
    "optim.*",
    "data.batch_size",
    "data.max_tokens",
)
_MEMORY = (
    "model.*",
    "train.*",
    "!model.allow_fork",
    "lora.*",
    "data.batch_size",
    "data.max_tokens",
    "zero.*",
    "memory.*",
)
# Patterns of the keys that a command reads; "!" takes away again. Not named: all.
READ_BY = {
    "prepare": _SAMPLES,
    "inspect": (*_SAMPLES, "!data.on_bad_sample"),
    "validate": (*_SAMPLES, *_DEEPSPEED, "model.*", "memory.*", "loss.*", "!optim.warmup_steps", "!optim.schedule"),
    "estimate": (
        *_MEMORY,
        "optim.gradient_accumulation_steps",
        "optim.ema_decay",
        "optim.type",
        "loss.keep_base",
        "checkpoint.async",
        "eval.asr",
        "eval.best_by",
        "eval.speaker_model",
    ),
    "zero-config": _DEEPSPEED,
}


def is_read(command: str, key: str) -> bool:
    """Whether `command` looks at `key`, or no configuration is one without it."""
    read = key in _NEEDED
    for pattern in READ_BY.get(command, ("*",)):
        taken_away = pattern.startswith("!")
        if fnmatch(key, pattern.removeprefix("!")):
            read = not taken_away or key in _NEEDED
    return read


def describe_keys(command: str) -> str:
    """The keys of a command, for the end of its help, as wide as the terminal."""
    lines = ["keys (each a flag too: --section.key VALUE):"]
    shown = [key for key in known_keys() if is_read(command, key[0])]
    for section, keys in groupby(shown, lambda key: key[0].partition(".")[0]):
        about = (Config.model_fields[section].annotation.__doc__ or "").partition("\n")[0]  # type: ignore[union-attr]
        lines += ["", *_wrap(f"{section}: {about}", indent=0)]
        for name, default, description in keys:
            lines += _describe_key(name, default, description)
    return "\n".join(lines)


def _describe_key(name: str, default: Any, description: str) -> Iterator[str]:
    short = {key: flag for flag, key in SHORT_FLAGS.items()}
    yield f"  --{name}" + (f"  (--{short[name]})" if name in short else "")
    value = _NEEDED.get(name, "" if default is None else f"default {_shown(default)}")
    yield from _wrap(description, indent=6)
    yield from _wrap("; ".join(filter(None, (allowed_values()[name], value))), indent=6)


def _wrap(text: str, *, indent: int) -> Sequence[str]:
    width = min(120, max(30, shutil.get_terminal_size().columns - 2))
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(str(one) for one in value) or "none"
    return (str(value).lower() if isinstance(value, bool) else str(value)) or "none"
