"""Read a manifest (a JSON array or JSON lines) entry by entry, with each entry's place in the file."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ds_higgs.data.problems import Problem
from ds_higgs.errors import UserError

READ_SIZE = 1 << 20
MAX_ENTRY_CHARACTERS = 1 << 28  # a longer single sample is a missing bracket, not a sample
LONGEST_LITERAL = 16  # a number, true, \\uXXXX: what can stand half at the window's end
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


def sample_id(manifest: Path, number: int) -> str:
    """Name a sample as messages do: "train.json:3"."""
    return f"{manifest.name}:{number}"


def read_manifest(path: Path) -> Iterator[Entry]:
    """Yield the entries of a manifest without ever holding more than one of them.

    A broken line of JSON lines is an entry with `error` set; what follows it is still read.

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


def _read_lines(path: Path) -> Iterator[Entry]:
    with open(path, "rb") as file:
        start = _skip_byte_order_mark(file)
        for number, line in enumerate(file, start=1):
            end = start + len(line)
            if line.strip():
                yield _parse_line(number, start, end, line)
            start = end


def _parse_line(number: int, start: int, end: int, line: bytes) -> Entry:
    try:
        return Entry(number, start, end, parse_json(line.rstrip(b"\r\n").decode("utf-8")))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
    except json.JSONDecodeError as error:
        problem = f"malformed JSON at column {error.colno}: {error.msg}"
    except (RecursionError, ValueError) as error:
        problem = f"malformed JSON: {error}"
    return Entry(number, start, end, None, problem)


def _read_array(path: Path) -> Iterator[Entry]:
    with open(path, "rb") as file:
        text = _TextWindow(path, file)
        text.expect("[")
        number = 0
        if text.peek() == "]":
            text.expect("]")
        else:
            while True:
                start = text.byte_position()
                data = text.parse_value()
                yield Entry(number, start, text.byte_position(), data)
                number += 1
                if text.peek() == "]":
                    text.expect("]")
                    break
                text.expect(",")
                text.peek()
        if text.peek() != "":
            text.fail("text after the closing bracket of the array")


class _TextWindow:
    """A window of decoded text over a file, moved along as JSON values are taken from it."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(parse_constant=lambda _: None)
        self._text = ""
        self._position = 0
        self._counted = 0  # the window's text before this place is in the two counts below
        self._bytes_before = _skip_byte_order_mark(file)
        self._lines_before = 0
        self._columns_before = 0  # of the line in which the window begins
        self._at_end = False
        self._read_more()

    def byte_position(self) -> int:
        self._count()
        return self._bytes_before

    def peek(self) -> str:
        """Skip white space; the next character, or "" at the end of the file."""
        while True:
            match = WHITE_SPACE.match(self._text, self._position)
            assert match is not None
            self._position = match.end()
            if self._position < len(self._text) or self._at_end:
                return self._text[self._position : self._position + 1]
            self._read_more()

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            self.fail(f"expected {character!r}, found {repr(found) if found else 'the end of the file'}")
        self._position += 1

    def parse_value(self) -> Any:
        """Parse the value at the current position, reading as far as it needs."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
                if end < len(self._text) or self._at_end:
                    self._position = end
                    return value
            except json.JSONDecodeError as error:
                if self._at_end or not self._could_be_cut_off(error):
                    self._position = error.pos
                    self.fail(error.msg)
            except (RecursionError, ValueError) as error:
                self.fail(str(error))
            self._read_more(len(self._text) - self._position)

    def fail(self, reason: str) -> NoReturn:
        self._count()
        line, column = self._lines_before + 1, self._column() + 1
        raise UserError(f"{self.path}, line {line}, column {column}: malformed JSON: {reason}")

    def _could_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether the error may come from the window's end and not from the file."""
        if len(self._text) - self._position > MAX_ENTRY_CHARACTERS:
            return False
        return error.msg.startswith("Unterminated string") or len(self._text) - error.pos < LONGEST_LITERAL

    def _count(self) -> None:
        consumed = self._text[self._counted : self._position]
        self._bytes_before += len(consumed.encode("utf-8"))
        self._lines_before += consumed.count("\n")
        self._counted = self._position

    def _column(self) -> int:
        newline = self._text.rfind("\n", 0, self._position)
        return self._position - newline - 1 if newline >= 0 else self._columns_before + self._position

    def _read_more(self, at_least: int = 0) -> None:
        """Drop the text before the position and append the next block of the file."""
        self._count()
        self._columns_before = self._column()
        rest = self._text[self._position :]
        self._position = self._counted = 0
        block = self._file.read(max(READ_SIZE, at_least))
        self._at_end = not block
        try:
            self._text = rest + self._utf8.decode(block, final=self._at_end)
        except UnicodeDecodeError as error:
            good = rest + error.object[: error.start].decode("utf-8")
            line = self._lines_before + good.count("\n") + 1
            raise UserError(f"{self.path}, line {line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None


def problem_at(manifest: Path, number: int, message: str, expected: str | None = None) -> Problem:
    return Problem(
        file=str(manifest), number=number, sample=sample_id(manifest, number), message=message, expected=expected
    )
