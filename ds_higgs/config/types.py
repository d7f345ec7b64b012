"""The types of the configuration's values: what a number, a text and a path may be, whatever key they stand at."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

# YAML 1.1 takes 5e8 for a text, because it has no dot.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1  # torch's generators take 64 bits, and ranks count on from it
MAX_SECONDS = 24 * 3600
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095


def read_number(value: Any) -> Any:
    """A text such as 5e8 as the number that is meant; `true`, which Python takes for 1, is none."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def check_text(text: str) -> str:
    """Refuse what no file, no message and no tracker can hold."""
    if not text.strip():
        raise ValueError("is empty")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds characters that are no text")
    return text


def check_path(path: str) -> str:
    """Refuse, besides, what is too long for a path."""
    names = [len(name.encode()) for name in check_text(path).split("/")]
    if max(names) > MAX_NAME_BYTES or sum(names) + len(names) > MAX_PATH_BYTES:
        raise ValueError(f"is too long for a path (a name has at most {MAX_NAME_BYTES} bytes)")
    return path


def find_not_finite(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths inside a setting that hold NaN or infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from find_not_finite(child, f"{path}.{key}" if path else str(key))


def _as_path(value: Any) -> Any:
    return Path(check_path(value)) if isinstance(value, str) else value


def _numbers_read(value: Any) -> Any:
    """`read_number` at every depth of a free setting."""
    if isinstance(value, dict):
        return {key: _numbers_read(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_numbers_read(child) for child in value]
    return value if isinstance(value, bool) else read_number(value)


Count = Annotated[int, Field(ge=1, le=MAX_COUNT), BeforeValidator(read_number)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT), BeforeValidator(read_number)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(read_number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(read_number)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(read_number)]
Probability = Annotated[float, Field(ge=0, lt=1), BeforeValidator(read_number)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS), BeforeValidator(read_number)]
SecondsOrZero = Annotated[float, Field(ge=0, le=MAX_SECONDS), BeforeValidator(read_number)]
Text = Annotated[str, AfterValidator(check_text)]
PathText = Annotated[str, AfterValidator(check_path)]  # a path, or a name such as a hub id
FilePath = Annotated[Path, BeforeValidator(_as_path)]
FreeSettings = Annotated[dict[str, Any], BeforeValidator(_numbers_read)]
