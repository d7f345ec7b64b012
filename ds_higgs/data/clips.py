"""Audio clips of a manifest: where their audio lies, its content hash, what their header tells."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from boson_multimodal.data_types import AudioContent

from ds_higgs.data.audio import AudioLimits, AudioSource, Segment, check_file, check_header, decode_base64, hash_audio
from ds_higgs.data.cache import CodeCache, clip_key
from ds_higgs.data.chatml import NO_URL
from ds_higgs.data.code_names import holds_codes
from ds_higgs.data.codec.source import CodecSource
from ds_higgs.data.codes import check_codes
from ds_higgs.data.manifest import read_entry
from ds_higgs.data.problems import BadSampleError
from ds_higgs.files import write_atomically

logger = logging.getLogger("ds_higgs")

MAX_MEMO_FILES = 32

_ELSEWHERE = "data.audio is elsewhere"
_MAX_HEADERS = 100_000  # remembered at a time

# Size, mtime_ns, inode and ctime_ns of a file.
Fingerprint = tuple[int, int, int, int]
MemoEntry = tuple[Fingerprint, str]

# path: as the manifest has it; content: hash of the file's bytes.
AUDIO_FILE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("inode", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("content", pa.string()),
    ]
)


@dataclass(frozen=True)
class Clip:
    """One clip of audio, ready to be found again.

    path: its file, or "" where the manifest itself holds the audio: then `start` and `end` are the bytes of its
        entry there, and `item` counts the entry's raw audio items.
    seconds: length as the header tells it.
    content: hash of the audio's bytes.
    """

    key: str
    path: str
    start: int
    end: int
    item: int
    offset: float
    duration: float | None
    seconds: float
    content: str

    @property
    def segment(self) -> Segment:
        return Segment(self.offset, self.duration)

    def name(self, *, learned: bool) -> str:
        """The clip in messages."""
        return audio_name(self.path, self.item, learned=learned)

    def source(self, manifest: Path) -> AudioSource:
        """The audio file, or the bytes of the manifest's raw audio."""
        if self.path:
            return Path(self.path)
        return decode_base64(raw_audio_items(read_entry(manifest, self.start, self.end))[self.item])


def audio_name(path: str, item: int, *, learned: bool | None = None) -> str:
    """An audio item in messages: its file (or its number among the sample's `raw_audio`) and what it is there for."""
    purpose = {True: "target ", False: "reference ", None: ""}[learned]
    return f"{purpose}audio {path or f'(`raw_audio`, number {item + 1} of the sample)'}"


def raw_audio_items(data: dict) -> list[str]:
    """The base64 texts of a checked manifest entry that are used (no file is named beside them)."""
    contents = [message["content"] for message in data["messages"]]
    items = [item for content in contents for item in (content if isinstance(content, list) else [content])]
    audio = [item for item in items if isinstance(item, dict) and item["type"] == "audio"]
    return [item["raw_audio"] for item in audio if item.get("audio_url") in (None, *NO_URL)]


class HashMemo:
    """Content hashes of audio files, remembered by absolute path, size, inode and times of change."""

    def __init__(self, cache_dir: Path):
        self._folder = cache_dir / "hashes"
        self._known: dict[str, MemoEntry] = {}
        self._new: dict[str, MemoEntry] = {}
        for path in self._files():
            self._known.update(_read_memo(path))

    def hash(self, path: Path) -> str:
        """Raises BadSampleError where the file is missing, unreadable or empty, or does not hold the recording."""
        return self.look_at(path)[1]

    def look_at(self, path: Path) -> MemoEntry:
        """A file's fingerprint and the hash of its content.

        Raises:
            BadSampleError: it is missing, unreadable or empty, or does not hold the recording.
        """
        fingerprint = fingerprint_of(check_file(path))
        name = str(path.absolute())
        if name not in self._known or self._known[name][0] != fingerprint:
            self._known[name] = self._new[name] = (fingerprint, hash_audio(path))
        return self._known[name]

    def save(self) -> None:
        """Write what has been hashed since the memo was read; many small files are merged into one.

        Where the cache cannot be written nothing is remembered: the next start hashes again.
        """
        if not self._new:
            return
        merged = self._files() if len(self._files()) >= MAX_MEMO_FILES else []
        content = json.dumps(self._known if merged else self._new).encode()
        path = self._folder / f"{hashlib.sha256(content).hexdigest()[:16]}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            logger.info("%s: hashes of audio files cannot be kept: %s", self._folder, error.strerror)
            return
        self._new = {}
        for old in merged:
            if old != path:
                with contextlib.suppress(OSError):  # another user's
                    old.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Oldest first, so that the newest entry for a path wins."""
        return sorted(self._folder.glob("*.json"), key=_modification_time)


def fingerprint_of(status: os.stat_result) -> Fingerprint:
    """What changes when a file does."""
    return (status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


# From the path in a manifest, an offset and a duration to what is known of the file without a look at it; None where
# that is nothing. Raises BadSampleError where it is known that the clip cannot be used.
KnownAudio = Callable[[str, float, float | None], MemoEntry | None]


class ClipFinder:
    """Turns a sample's audio items into checked clips with their cache keys.

    Args:
        codec: whose codes may stand in place of audio; None: they are refused.
        known: asked before a file is looked at.
        may_look: whether files may be looked at; else what is not known, or has no codes, cannot be used.
    """

    def __init__(
        self,
        cache: CodeCache,
        memo: HashMemo,
        *,
        audio_root: Path,
        limits: AudioLimits,
        codec: CodecSource | None = None,
        known: KnownAudio | None = None,
        may_look: bool = True,
    ):
        self._cache = cache
        self._memo = memo
        self._audio_root = audio_root
        self._limits = limits
        self._codec = codec
        self._known = known
        self._may_look = may_look
        self._seconds: dict[str, float | BadSampleError] = {}  # by key, what the header gave
        self._files: dict[str, MemoEntry] = {}

    def take_files(self) -> pa.RecordBatch:
        """The audio files that clips have been found in since the last call, as AUDIO_FILE_SCHEMA."""
        rows = [(path, *fingerprint, content) for path, (fingerprint, content) in self._files.items()]
        self._files = {}
        columns = zip(*rows, strict=True) if rows else [[]] * len(AUDIO_FILE_SCHEMA)
        return pa.record_batch([list(column) for column in columns], schema=AUDIO_FILE_SCHEMA)

    def find(self, content: AudioContent, *, start: int, end: int, item: int, learned: bool) -> Clip:
        """Check an audio item as far as its header goes (a cached clip needs no look).

        Args:
            start, end: bytes of the sample's entry in the manifest; item: counts its raw audio items.
            learned: whether it is a target.

        Raises:
            BadSampleError: the audio cannot be used.
        """
        try:
            return self.look_at(content, start=start, end=end, item=item)
        except BadSampleError as error:
            raise error.of(audio_name(self._path(content), item, learned=learned)) from None

    def look_at(self, content: AudioContent, *, start: int, end: int, item: int) -> Clip:
        """`find`, of an item of which nobody knows what it is there for."""
        path = self._path(content)
        offset, duration = content.offset or 0.0, content.duration
        source: AudioSource
        if path:
            source = Path(path)
            known = self._known and self._known(content.audio_url, offset, duration)
            if known is None and not self._may_look:
                raise BadSampleError("nothing of it is prepared", f"what was prepared where it lies; {_ELSEWHERE}")
            looked_at = known or self._memo.look_at(source)
            self._files[content.audio_url] = looked_at
            content_hash = looked_at[1]
        else:
            source = decode_base64(content.raw_audio or "")
            content_hash = hashlib.sha256(source).hexdigest()
        key = clip_key(content_hash, offset=offset, duration=duration, codec_identity=self._cache.codec_identity)
        seconds = self._check(key, source, Segment(offset, duration))
        return Clip(key, path, start, end, item, offset, duration, seconds, content_hash)

    def _path(self, content: AudioContent) -> str:
        return "" if content.audio_url in NO_URL else str(self._audio_root / content.audio_url)

    def _look_into(self, source: AudioSource, segment: Segment) -> float:
        if self._codec is not None and isinstance(source, Path) and holds_codes(source):
            return check_codes(source, segment, self._limits, self._codec)
        return check_header(source, segment, self._limits)

    def _check(self, key: str, source: AudioSource, segment: Segment) -> float:
        seconds = self._cache.seconds_of(key)
        if seconds is not None:
            self._limits.check(seconds)
            return seconds
        if not self._may_look and isinstance(source, Path):
            raise BadSampleError("its codes are not in the code cache", f"them there; {_ELSEWHERE}")
        if key not in self._seconds:
            if len(self._seconds) == _MAX_HEADERS:
                self._seconds.clear()
            try:
                self._seconds[key] = self._look_into(source, segment)
            except BadSampleError as error:
                self._seconds[key] = error
        found = self._seconds[key]
        if isinstance(found, BadSampleError):
            raise found
        return found


def _modification_time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # merged by another process
        return 0


def _read_memo(path: Path) -> dict[str, MemoEntry]:
    """Nothing where the file is damaged, not ours to read, or merged by another process in the meantime."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        return {name: (_fingerprint(numbers), str(digest)) for name, (numbers, digest) in rows.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _fingerprint(numbers: list[int]) -> Fingerprint:
    size, modified, inode, changed = numbers
    return size, modified, inode, changed
