"""Read a manifest (a JSON array or JSON lines) entry by entry, with each entry's place in the file."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ds_higgs.data.problems import Problem
from ds_higgs.errors import UserError

READ_SIZE = 1 << 20
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Entry:
    """One element of a manifest.

    number: the index from 0 in a JSON array, the line from 1 in JSON lines.
    start, end: the byte range of its JSON text in the file.
    data: the parsed JSON, or None where `error` says why it could not be parsed.
    """

    number: int
    start: int
    end: int
    data: Any
    error: str | None = None


@dataclass(frozen=True)
class RawEntry:
    """One element of a manifest before it is parsed.

    text: its JSON, without white space around it.
    data: the parsed JSON, where finding the element's end took that.
    """

    number: int
    start: int
    end: int
    text: bytes
    data: Any = None

    @property
    def digest(self) -> bytes:
        """16 bytes that name the text."""
        return hashlib.blake2b(self.text, digest_size=16).digest()

    def parse(self) -> Entry:
        """A broken line is an entry with `error` set."""
        if self.data is not None:
            return Entry(self.number, self.start, self.end, self.data)
        return _parse_line(self.number, self.start, self.end, self.text)


def sample_id(manifest: Path, number: int) -> str:
    """Name a sample as messages do: "train.json:3"."""
    return f"{manifest.name}:{number}"


def read_manifest(path: Path) -> Iterator[Entry]:
    """Yield the entries of a manifest; see `scan_manifest`.

    A broken line of JSON lines is an entry with `error` set; what follows it is still read.
    """
    return (entry.parse() for entry in scan_manifest(path))


def scan_manifest(path: Path) -> Iterator[RawEntry]:
    """Yield the entries of a manifest, those of JSON lines unparsed; of them, only one is ever held.

    Raises:
        UserError: the file cannot be read, is empty, or is an array that stops being JSON (with line and column).
    """
    try:
        with open(path, "rb") as file:
            opening = _first_character(file)
        if opening is None:
            raise UserError(f"{path}: the manifest is empty; expected a JSON array or JSON lines of ChatML samples")
        yield from (_read_array(path) if opening == b"[" else _read_lines(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read the manifest: {error.strerror or error}") from None


def read_entry(path: Path, start: int, end: int) -> Any:
    """Parse again the entry at a byte range that `read_manifest` gave."""
    with open(path, "rb") as file:
        file.seek(start)
        return parse_json(file.read(end - start).decode("utf-8"))


def parse_json(text: str) -> Any:
    """Parse JSON in which NaN, as pandas writes it for a missing value, means null."""
    return json.loads(text, parse_constant=lambda _: None)


def _first_character(file: BinaryIO) -> bytes | None:
    _skip_byte_order_mark(file)
    while block := file.read(READ_SIZE):
        if stripped := block.lstrip():
            return stripped[:1]
    return None


def _skip_byte_order_mark(file: BinaryIO) -> int:
    """Bytes skipped at the file's start."""
    if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        return len(codecs.BOM_UTF8)
    file.seek(0)
    return 0


def _read_lines(path: Path) -> Iterator[RawEntry]:
    with open(path, "rb") as file:
        start = _skip_byte_order_mark(file)
        for number, line in enumerate(file, start=1):
            end = start + len(line)
            if line.strip():
                yield RawEntry(number, start, end, line.rstrip(b"\r\n"))
            start = end


def _parse_line(number: int, start: int, end: int, line: bytes) -> Entry:
    try:
        return Entry(number, start, end, parse_json(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
    except json.JSONDecodeError as error:
        problem = f"malformed JSON at column {error.colno}: {error.msg}"
    except (RecursionError, ValueError) as error:
        problem = f"malformed JSON: {error}"
    return Entry(number, start, end, None, problem)


def _read_array(path: Path) -> Iterator[RawEntry]:
    text = _ArrayText(path)
    text.expect("[")
    number = 0
    while number > 0 or text.peek() != "]":
        text.peek()
        start = text.byte_position()
        value, data = text.parse_value()
        yield RawEntry(number, start, text.byte_position(), value.encode("utf-8"), data)
        number += 1
        if text.peek() == "]":
            break
        text.expect(",")
    text.expect("]")
    if text.peek() != "":
        text.fail("text after the closing bracket of the array")


class _ArrayText:
    """The text of a JSON array, from which values are parsed one by one; large sets are better kept as JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self._bytes_counted = _skip_byte_order_mark(file)
            content = file.read()
        try:
            self._text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}, line {line}: not UTF-8: byte 0x{content[error.start]:02x}") from None
        self._json = json.JSONDecoder(parse_constant=lambda _: None)
        self._position = self._counted = 0

    def byte_position(self) -> int:
        """Of the current position in the file."""
        self._bytes_counted += len(self._text[self._counted : self._position].encode("utf-8"))
        self._counted = self._position
        return self._bytes_counted

    def peek(self) -> str:
        """Skip white space; the next character, or "" at the end of the file."""
        match = WHITE_SPACE.match(self._text, self._position)
        assert match is not None
        self._position = match.end()
        return self._text[self._position : self._position + 1]

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            self.fail(f"expected {character!r}, found {repr(found) if found else 'the end of the file'}")
        self._position += 1

    def parse_value(self) -> tuple[str, Any]:
        """The next value's text, and what it says."""
        first = self._position
        try:
            value, self._position = self._json.raw_decode(self._text, first)
        except json.JSONDecodeError as error:
            self._position = error.pos
            self.fail(error.msg)
        except (RecursionError, ValueError) as error:
            self.fail(str(error))
        return self._text[first : self._position], value

    def fail(self, reason: str) -> NoReturn:
        line = self._text.count("\n", 0, self._position) + 1
        column = self._position - self._text.rfind("\n", 0, self._position)
        raise UserError(f"{self.path}, line {line}, column {column}: malformed JSON: {reason}")


def problem_at(manifest: Path, number: int, message: str, expected: str | None = None) -> Problem:
    return Problem(
        file=str(manifest), number=number, sample=sample_id(manifest, number), message=message, expected=expected
    )
