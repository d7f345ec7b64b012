"""Types of the commands' own arguments: argparse tells what was found and what was expected, status 2."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from ds_higgs.config.types import MAX_COUNT, MAX_SECONDS, MAX_SEED

MAX_SHARES = 99_999


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _checked(text, int, lambda value: 1 <= value <= MAX_COUNT, f"a whole number from 1 to {MAX_COUNT}")


def seed(text: str) -> int:
    """A whole number that every random generator takes."""
    return _checked(text, int, lambda value: 0 <= value <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}")


def count_or_zero(text: str) -> int:
    """A whole number from 0 on."""
    return _checked(text, int, lambda value: 0 <= value <= MAX_COUNT, f"a whole number from 0 to {MAX_COUNT}")


def positive(text: str) -> float:
    """A finite number above 0."""
    return _checked(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def positive_or_zero(text: str) -> float:
    """A finite number from 0 on."""
    return _checked(text, float, lambda value: 0 <= value < math.inf, "a number of 0 or more")


def numbers(text: str) -> tuple[float, ...]:
    """Several different numbers of 0 or more, with commas between."""
    found = tuple(positive_or_zero(one.strip()) for one in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected each number once")
    return found


def two_names(text: str) -> tuple[str, str]:
    """Two different names, with a comma between."""
    names = tuple(one.strip() for one in text.split(","))
    if len(set(names)) != 2 or len(names) != 2 or "" in names:
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected two different names with a comma between")
    return names[0], names[1]


def share(text: str) -> float:
    """A part of a whole, which may be all of it."""
    return _checked(text, float, lambda value: 0 < value <= 1, "a number above 0, up to 1")


def share_of(text: str) -> tuple[int, int]:
    """One of several shares, "3/64"."""
    number, slash, whole = text.partition("/")
    expected = "I/N with I from 1 to N, such as 3/64"
    if slash and number.isdecimal() and whole.isdecimal() and 1 <= int(number) <= int(whole) <= MAX_SHARES:
        return int(number), int(whole)
    raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected {expected}")


def seconds(text: str) -> float:
    """A length of audio."""
    return _checked(text, float, lambda value: 0 < value <= MAX_SECONDS, f"a number above 0, up to {MAX_SECONDS}")


def card_gib(text: str) -> float:
    """The memory of a GPU."""
    return _checked(text, float, lambda value: 0 < value <= 100_000, "GiB, above 0 and up to 100000")


def device(text: str) -> str:
    """A device of this machine's."""
    import torch  # takes a second, and most commands name no device

    try:
        kind, index = torch.device(text).type, torch.device(text).index or 0
    except RuntimeError:
        kind, index = "", 0
    if kind == "cpu" or (kind == "cuda" and index < torch.cuda.device_count()):
        return text
    found = torch.cuda.device_count()
    raise argparse.ArgumentTypeError(
        f"found {text[:40]!r}, expected cpu" + (f", cuda or cuda:N, N < {found}" * bool(found))
    )


def _checked(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
        if fits(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected {expected}")
