"""Random command lines, each from a seed: sound settings with wild values, unknown keys, and damaged YAML files."""

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ds_higgs.config.file import SHORT_FLAGS, known_keys

Values = dict[str, Any]
KEYS = sorted(key for key, _, _ in known_keys())
SECTIONS = sorted({key.split(".")[0] for key in KEYS})
# `train` alone reads some values: the others still have to get past it.
COMMANDS = ("zero-config",) * 6 + ("estimate",) * 3 + ("validate",) * 2
NUMBERS = (
    0, 1, -1, 2, 3, 7, 0.5, 1e-4, 1e300, -1e300, 1e-320, 5e-324, 10**9, 2**31, 2**63, 2**70, -(2**70), 10**400,
    10**4000, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", " ", "auto", "none", "null", "never", "full", "bf16", "fp16", "nf4", "cosine", "assistant", "skip", "loss", "-",
    "a/b", "a/b/c/d", "../..", "/", ".", "~", "~nobody/x", "/dev/null", "/dev/null/x", "/proc/x", "x" * 300,
    "y/" * 3000, "nul\0byte", "\ud800", "\u2028", "ملف", "a\nb", "*", "(", "a{99999999999}", ".*", "(?P<a>x)(?P<a>x)",
    "[" * 200,
    "${HOME}", "%s", "2026-11-21", "12:30:00", "1_000", "0x_", "1e5", "true", "--x", "=", "{}", "[1, 2", "!!int x",
)  # fmt: skip
OTHERS = (
    None, True, False, [], {}, [None], [[]], [1] * 8, [0] * 8, [1] * 7, [1e308] * 8, {"a": 1}, {1: 2}, {None: []},
    {True: 1}, datetime.date(2026, 11, 21), datetime.datetime(2026, 11, 21, 1, 2, 3), b"bytes", {"enabled": True},
    {"stage": 3}, ["attention"], ["attention", "attention"], ["q_proj"], {"api_key": "x"},
    {"a": {"b": {"c": float("nan")}}},
)  # fmt: skip
PLAUSIBLE = (1, 2, 3, 8, 1000, 0.5, 0.25, True, False, None, "auto", "none", "base", "absent.json", ["audio_ffn"])
EXTRA = (
    "zero_optimization", "tensorboard", "wandb", "comet", "csv_monitor", "aio", "timers", "flops_profiler", "compile",
    "optimizer", "bf16", "steps_per_print", "train_batch_size", "wall_clock_breakdown", "zero_optimisation", "", "a.b",
)  # fmt: skip
# Pieces of YAML that take a file out of the ordinary.
PIECES = (
    "\nrun: {output_dir: again}\n", "\nlora:\n  rank: 1\n  rank: 2\n", "\nzero: &a {extra: {x: *a}}\n", 
    "\n? [a]\n: b\n",
    "\nlora: !!python/object/apply:os.system [x]\n", "\nrun: {seed: !!int x}\n", "\nrun: {deterministic: !!bool x}\n",
    "\nrun: {seed: 0b_}\n", "\nrun: {seed: 0x" + "f" * 6000 + "}\n", "\nrun: {seed: 2026-99-99}\n", "\n---\nrun: {}\n",
    "\nrun: {seed: !!timestamp x}\n", "\nloss: {codebook_weights: !!set {1, 2}}\n", "\nextra: !!binary '%'\n", "\n\t\n",
    "\nrun: *nothing\n", "\n<<: 5\n", "\n<<: {lora: {rank: 4}}\n", "\nlora: {<<: [1]}\n", "\nx: " + "[" * 3000,
    "\0", "\x07",
    "\nx: &x1 [1, 1]\ny: &x2 [*x1, *x1]\n" + "".join(f"z{n}: &x{n} [*x{n - 1}, *x{n - 1}]\n" for n in range(3, 60)),
    "\n%YAML 9.9\n", "\n...\nx", "\nzero: {extra: {tensorboard: null, zero_optimization: null}}\n",
    "\n- a\n", "\n:\n", "'",
)  # fmt: skip


def wild_arguments(seed: int, sound: Values, folder: Path) -> list[str]:
    """A command line for `ds_higgs.cli.main`; its configuration is `folder`/config.yaml.

    sound: "section.key" to the values with which each of COMMANDS ends well.
    """
    chance = random.Random(seed)
    values: Values = {}
    for key, value in sound.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    for _ in range(chance.choice((0, 0, 1, 1, 1, 2))):
        chance.choice(MUTATIONS)(values, chance)
    file = folder / "config.yaml"
    file.write_bytes(_damaged(yaml.safe_dump(values, allow_unicode=chance.random() < 0.5, sort_keys=False), chance))
    command = chance.choice(COMMANDS)
    return [command, "-c", str(file), *_flags(command, chance)]


def _wild_value(chance: random.Random) -> Any:
    if chance.random() < 0.4:
        return chance.choice(PLAUSIBLE)
    return chance.choice(chance.choice((NUMBERS, TEXTS, OTHERS)))


def _set_key(values: Values, chance: random.Random) -> None:
    section, name = chance.choice(KEYS).split(".")
    part = values.setdefault(section, {})
    if isinstance(part, dict):
        part[name] = _wild_value(chance)


def _set_extra(values: Values, chance: random.Random) -> None:
    zero = values.setdefault("zero", {})
    if isinstance(zero, dict):
        zero["extra"] = {chance.choice(EXTRA): _wild_value(chance)}


def _set_section(values: Values, chance: random.Random) -> None:
    values[chance.choice(SECTIONS)] = _wild_value(chance)


def _add_unknown_key(values: Values, chance: random.Random) -> None:
    part = values.setdefault(chance.choice(SECTIONS), {})
    (part if isinstance(part, dict) else values)[chance.choice((*TEXTS, 1, None, 2.5, True))] = _wild_value(chance)


def _drop(values: Values, chance: random.Random) -> None:
    values.pop(chance.choice(SECTIONS), None)


MUTATIONS: tuple[Callable[[Values, random.Random], None], ...] = (
    _set_key, _set_key, _set_key, _set_key, _set_extra, _set_section, _add_unknown_key, _drop,
)  # fmt: skip


def _damaged(text: str, chance: random.Random) -> bytes:
    """The text as a file's bytes; in three of ten cases not as it should be."""
    place = chance.randrange(len(text) + 1)
    match chance.randrange(20):
        case 0:
            text = text[:place]
        case 1 | 2:
            text += chance.choice(PIECES)
        case 3:
            text = text[:place] + chance.choice((*PIECES, *"[]{}:-&*!|>'\"%@`#,?\t")) + text[place:]
        case 4:
            return text.encode(chance.choice(("utf-16", "utf-8-sig", "cp037", "utf-32-le")), errors="replace")
        case 5:
            content = bytearray(text.encode("utf-8", errors="surrogatepass"))
            for _ in range(3):
                content[chance.randrange(len(content))] = chance.randrange(256)
            return bytes(content)
    return text.encode("utf-8", errors="surrogatepass")


def _flags(command: str, chance: random.Random) -> list[str]:
    flags = []
    for _ in range(chance.choice((0, 0, 0, 0, 1, 2))):
        name = chance.choice(
            (*KEYS, *SHORT_FLAGS, "zero.extra." + chance.choice(EXTRA), "zero.extra.", "x", "local_rank")
        )
        flags.append(f"--{name}={_as_flag(_wild_value(chance))}")
    numbers = [_as_flag(chance.choice(NUMBERS)) for _ in range(2)]
    if command == "estimate" and chance.random() < 0.3:
        flags += [f"--{chance.choice(('world-size', 'positions', 'card-gib'))}={numbers[0]}", f"--lr={numbers[1]}"]
    if command == "zero-config" and chance.random() < 0.2:
        flags += [
            "-o",
            chance.choice((".", "/dev/null", "/dev/null/x", "absent/x.json", "out.json", "x" * 300, "nul\0")),
        ]
    if chance.random() < 0.03:
        flags.append(chance.choice(("word", "-z", "--", "--lr", "\udcff")))
    return flags


def _as_flag(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
