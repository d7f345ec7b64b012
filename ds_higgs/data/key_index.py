"""Rows by their 16-byte keys: two sorted arrays of 8 bytes a row, nothing in Python."""

import hashlib
from collections.abc import Iterable

import numpy as np

KEY_BYTES = 16


def key_of(name: str) -> bytes:
    """A key for a name, such as a path, whatever bytes it stands for."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=KEY_BYTES).digest()


def join_keys(keys: Iterable[bytes]) -> np.ndarray:
    """Keys one after another as [n, KEY_BYTES] uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


class KeyIndex:
    """Finds rows by key; of equal keys the first.

    Args:
        keys: [rows, KEY_BYTES] uint8, evenly distributed, as hashes are.
    """

    def __init__(self, keys: np.ndarray):
        self._keys = keys
        prefixes = _prefixes(keys)
        self._order = np.argsort(prefixes, kind="stable")
        self._sorted = prefixes[self._order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[n, KEY_BYTES] uint8 -> [n] int64 rows, -1 where there is none."""
        prefixes = _prefixes(keys)
        places = np.searchsorted(self._sorted, prefixes)
        found = np.full(len(keys), -1, dtype=np.int64)
        open_ = np.arange(len(keys))
        while len(open_):  # once, but for keys whose first 8 bytes another key has too
            inside = places[open_] < len(self._sorted)
            open_ = open_[inside]
            open_ = open_[self._sorted[places[open_]] == prefixes[open_]]
            rows = self._order[places[open_]]
            equal = (self._keys[rows] == keys[open_]).all(axis=1)
            found[open_[equal]] = rows[equal]
            open_ = open_[~equal]
            places[open_] += 1
        return found

    def find_one(self, key: bytes) -> int:
        """The row of one key, -1 where there is none."""
        wanted = np.frombuffer(key, np.uint8)
        prefix = wanted[:8].view(np.uint64)[0]
        place = int(np.searchsorted(self._sorted, prefix))
        while place < len(self._sorted) and self._sorted[place] == prefix:
            row = int(self._order[place])
            if (self._keys[row] == wanted).all():
                return row
            place += 1
        return -1


def _prefixes(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)
