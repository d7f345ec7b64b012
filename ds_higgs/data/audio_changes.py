"""Audio files as they were when they were looked at: whether they are so still, and what is known of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ds_higgs.data.clips import AUDIO_FILE_SCHEMA, HashMemo, MemoEntry, fingerprint_of
from ds_higgs.data.containers.opening import file_on_disk
from ds_higgs.data.key_index import KeyIndex, join_keys, key_of
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.sample_table import SampleTable

_CHUNK = 10_000


@dataclass
class LookedAt:
    """changed: paths, as the manifest has them, of files with other content; num_missing: files that are not there."""

    changed: list[str] = field(default_factory=list)
    num_missing: int = 0


def look_at_files(files: pa.Table, audio_root: Path, cache_dir: Path, *, share: int = 0, shares: int = 1) -> LookedAt:
    """Look at every `shares`-th chunk of files; only those whose size, time or place has changed are read.

    Args:
        files: of AUDIO_FILE_SCHEMA.
        audio_root: what relative paths are relative to.
        cache_dir: where the hashes of files are remembered.
    """
    found = LookedAt()
    memo: HashMemo | None = None
    for start in range(share * _CHUNK, len(files), shares * _CHUNK):
        path, *known, content = (column.to_pylist() for column in files.slice(start, _CHUNK).columns)
        for name, fingerprint, digest in zip(path, zip(*known, strict=True), content, strict=True):
            file = os.path.join(audio_root, name)
            try:
                if fingerprint_of(os.stat(file_on_disk(file))) == fingerprint:
                    continue
            except FileNotFoundError:
                found.num_missing += 1
                continue
            except (OSError, ValueError):
                found.changed.append(name)  # its analysis will tell
                continue
            memo = memo or HashMemo(cache_dir)
            if _content(memo, Path(file)) != digest:
                found.changed.append(name)
    if memo is not None:
        memo.save()
    return found


def _content(memo: HashMemo, file: Path) -> str | None:
    try:
        return memo.hash(file)
    except BadSampleError:  # its analysis will tell
        return None


def unchanged_samples(samples: SampleTable, changed: frozenset[str]) -> np.ndarray:
    """[samples] bool, those none of whose audio has changed."""
    unchanged = np.ones(len(samples), dtype=np.bool_)
    if changed:
        uses = pc.is_in(samples.paths(), value_set=pa.array(sorted(changed)))
        rows = np.searchsorted(samples.clip_ends, np.flatnonzero(uses.to_numpy()), side="right")
        unchanged[rows] = False
    return unchanged


def files_of(samples: SampleTable, files: pa.Table) -> pa.Table:
    """The audio files that the samples name, each once: the first of `files` with its path."""
    rows = pc.index_in(samples.paths().unique(), value_set=files["path"].combine_chunks())
    return files.take(rows.drop_null()).combine_chunks()


class KnownFiles:
    """What was seen of audio files, by someone, somewhere: a `clips.KnownAudio`.

    Args:
        files: of AUDIO_FILE_SCHEMA.
        errors: by path, offset and duration, the clips that cannot be used.
    """

    def __init__(self, files: pa.Table, errors: Mapping[tuple[str, float, float | None], BadSampleError]):
        self._files = files
        self._errors = errors
        paths = (path for batch in files.to_batches() for path in batch.column("path").to_pylist())
        self._index = KeyIndex(join_keys(map(key_of, paths)))

    def __call__(self, path: str, offset: float, duration: float | None) -> MemoEntry | None:
        """Raises BadSampleError for a clip that cannot be used."""
        if (error := self._errors.get((path, offset, duration))) is not None:
            raise error
        row = self._index.find_one(key_of(path))
        if row < 0:
            return None
        _, *fingerprint, content = (self._files[name][row].as_py() for name in AUDIO_FILE_SCHEMA.names)
        size, modified, inode, changed = fingerprint
        return (size, modified, inode, changed), content

    def changed(self, files: pa.Table) -> frozenset[str]:
        """Paths of the files that were seen with another content than `files` says."""
        found: list[str] = []
        for start in range(0, len(files), _CHUNK):
            paths, contents = (files[name].slice(start, _CHUNK).to_pylist() for name in ("path", "content"))
            for path, content in zip(paths, contents, strict=True):
                row = self._index.find_one(key_of(path))
                if row >= 0 and self._files["content"][row].as_py() != content:
                    found.append(path)
        return frozenset(found)
