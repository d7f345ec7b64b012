"""A checkpoint's weights in safetensors files, one or several: read and written one tensor at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ds_higgs.errors import UserError
from ds_higgs.files import write_json

MODEL = "model"  # the files of a whole model are model.safetensors, or model-00001-of-00003.safetensors and an index
MAX_FILE_BYTES = 5 * 10**9
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class StoredWeights:
    """Weights on a disk, by name.

    files: the file that holds each, and its name there; shapes: of each.
    """

    files: Mapping[str, tuple[Path, str]]
    shapes: Shapes

    @classmethod
    def open(cls, folder: Path, stem: str = MODEL) -> "StoredWeights":
        """The weights in `folder`'s files that are named like `stem`.

        Raises:
            UserError: they are missing or damaged.
        """
        files, shapes = {}, {}
        for file in list_weight_files(folder, stem):
            try:
                with safe_open(file, framework="pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
                        files[name] = file, name
                        shapes[name] = tuple(weights.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: the weights cannot be read: {error}") from error
        return cls(files, shapes)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file: memory that is given back with it."""
        file, stored_name = self.files[name]
        with safe_open(file, framework="pt") as weights:
            return weights.get_tensor(stored_name)

    def renamed(self, names: Mapping[str, str]) -> "StoredWeights":
        """The same weights, each under the name that `names` gives for its own."""
        files = {new: self.files[old] for old, new in names.items()}
        return StoredWeights(files, {new: self.shapes[old] for old, new in names.items()})


def weight_file_names(stem: str = MODEL) -> tuple[str, str]:
    """Names of the one file that holds all weights, and of the index of several."""
    return f"{stem}.safetensors", f"{stem}.safetensors.index.json"


def list_weight_files(folder: Path, stem: str = MODEL) -> list[Path]:
    """The files of `folder` that hold its weights.

    Raises:
        UserError: there is neither the one file nor an index of several.
    """
    single, index = (folder / name for name in weight_file_names(stem))
    if single.is_file():
        return [single]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({folder / file for file in weight_map.values()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weight files: {error!r}") from error


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    shapes: Shapes,
    dtype: torch.dtype,
    stem: str = MODEL,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write weights into `folder` as they come: no more than one of them is in memory.

    Args:
        tensors: name and tensor, on any device and of any float type, in the order of `shapes`.
        shapes: of all of them.
    """
    coming = iter(tensors)
    parts = _divide(shapes, itemsize=dtype.itemsize, max_bytes=max_file_bytes)
    single, index = weight_file_names(stem)
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for file, part in zip(names if len(parts) > 1 else [single], parts, strict=True):
        _write_file(folder / file, coming, {name: shapes[name] for name in part}, dtype)
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        total = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
        write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _divide(shapes: Shapes, *, itemsize: int, max_bytes: int) -> list[list[str]]:
    """The names in parts of at most `max_bytes`; a larger tensor has a part of its own."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = prod(shape) * itemsize
        if parts[-1] and filled + size > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _write_file(path: Path, coming: Iterator[tuple[str, torch.Tensor]], shapes: Shapes, dtype: torch.dtype) -> None:
    with path.open("wb") as file:
        file.write(_header(shapes, dtype))
        for name, shape in shapes.items():
            found, tensor = next(coming)
            assert (found, tuple(tensor.shape)) == (name, tuple(shape)), (found, tensor.shape, name, shape)
            raw = tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8)
            file.write(raw.numpy().data)


def _header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    """The beginning of a safetensors file: its length, then where each tensor lies, padded to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
