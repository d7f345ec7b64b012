"""Recordings in a tar archive, as WebDataset's shards are: read where they lie, nothing is unpacked."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ds_higgs.data.containers.container import ContainerKind, FilePart
from ds_higgs.data.key_index import KeyIndex, join_keys, key_of
from ds_higgs.data.problems import BadSampleError


class TarContainer:
    """An archive's members by name; of each only 48 bytes are kept in memory."""

    def __init__(self, path: Path):
        self._path = path
        keys, places = [], []
        for member in tar_members(path):
            keys.append(key_of(member.name))
            places.append((member.offset_data, member.size))
        self._index = KeyIndex(join_keys(keys))
        self._places = np.asarray(places, dtype=np.int64).reshape(-1, 2)
        self.weight = len(places)

    def open(self, name: str) -> BinaryIO:
        """See Container."""
        row = self._index.find_one(key_of(name))
        if row < 0:
            raise KeyError(name)
        start, size = self._places[row].tolist()
        return io.BufferedReader(FilePart(self._path, start, size))


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files in an archive, one after another, by their headers alone.

    Raises:
        BadSampleError: it is no archive that is not compressed, or is cut off.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would remember them all
                if member.isreg() and not member.issparse():
                    yield member
    except tarfile.TarError as error:
        raise BadSampleError(
            f"{path.name} is no tar archive: {error}", "one that is whole and not compressed"
        ) from None


KIND = ContainerKind(".tar", TarContainer)
