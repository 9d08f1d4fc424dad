"""Records of a JSON file of any size, one after the other, in constant memory.

Owns finding where one record of a JSON array (or of JSON Lines) ends and the next begins, and
naming the line where that is impossible. A record comes as its bytes, so that whoever decodes it
can do so in another process. Knows nothing about what a record holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from w2c_tui.core.errors import ConfigError
from w2c_tui.core.printable import quoted

CHUNK_BYTES = 4 * 2**20
MAX_RECORD_BYTES = 64 * 2**20

_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+'
_TOKEN = re.compile(_STRING + rb'"|["{}\[\]]')
_OPEN_STRING = re.compile(_STRING)
_LITERAL = re.compile(rb'[^\s,\[\]{}":]+')
_SPACE = re.compile(rb"[ \t\r\n]*")
_CLOSES = {0x7B: 0x7D, 0x5B: 0x5D}
_BOM = b"\xef\xbb\xbf"


class Position(msgspec.Struct, frozen=True):
    """A place between two records: bytes, line ends and records before it.

    `kind`: "" before anything was read, "array" or "lines" in the middle, "end" after it.
    """

    offset: int = 0
    lines: int = 0
    records: int = 0
    kind: str = ""


BEGINNING = Position()


class RawRecord(msgspec.Struct, frozen=True):
    """The bytes of one value, where it starts (from 1), and the place just after it."""

    data: bytes
    line: int
    number: int
    after: Position


def read_records(path: Path, start: Position = BEGINNING) -> Iterator[RawRecord]:
    """The values of the array in `path`, or of its lines, from `start` on.

    Raises ConfigError that names the line for a file whose structure is broken, and for one that
    cannot be read. What is inside a record is not checked beyond strings and brackets.
    """
    try:
        with path.open("rb") as file:
            file.seek(start.offset)
            yield from _Splitter(path, file, start).records()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}.", hint="Check the path."
        ) from error


class _Incomplete(Exception):
    """The value goes on after the end of the buffer."""


class _Splitter:
    def __init__(self, path: Path, file: BinaryIO, start: Position) -> None:
        self._path = path
        self._file = file
        self._buffer = b""
        self._at = 0
        self._base = start.offset
        self._counted = 0
        self._lines = start.lines
        self._number = start.records
        self._kind = start.kind
        self._at_end = False

    def records(self) -> Iterator[RawRecord]:
        if self._kind == "end":
            return
        if not self._kind:
            self._open()
        first = self._number == 0
        while self._next_value(first):
            first = False
            # Reading on to the end may move the beginning to the start of the buffer.
            end = self._value_end()
            begin = self._at
            line = self._line_of(begin)
            self._at = end
            self._number += 1
            after = Position(self._base + end, self._line_of(end) - 1, self._number, self._kind)
            yield RawRecord(self._buffer[begin:end], line, self._number, after)

    def _open(self) -> None:
        self._more()
        if self._buffer.startswith(_BOM):
            self._at = len(_BOM)
        byte = self._peek()
        if byte is None:
            raise ConfigError(f"{self._path} is empty.", hint="Download it again.")
        if byte == b"[":
            self._kind = "array"
            self._at += 1
        elif byte == b"{":
            self._kind = "lines"
        else:
            raise self._broken(self._at, f"it starts with {quoted(self._text(self._at))}")

    def _next_value(self, first: bool) -> bool:
        """Move to where the next value begins; False at the end of the file's values."""
        byte = self._peek()
        if self._kind == "lines":
            return byte is not None
        if byte == b"," and not first:
            self._at += 1
            byte = self._peek()
        elif byte == b"]":
            self._at += 1
            self._kind = "end"
            if self._peek() is not None:
                raise self._broken(self._at, "something stands after the end of the list")
            return False
        elif byte is not None and not first:
            raise self._broken(self._at, "a comma is missing between two records")
        if byte is None:
            raise self._broken(self._at, "the file ends inside the list of records")
        return True

    def _value_end(self) -> int:
        while True:
            try:
                return self._scan(self._at)
            except _Incomplete:
                if len(self._buffer) - self._at > MAX_RECORD_BYTES:
                    raise self._broken(
                        self._at, f"a record is longer than {MAX_RECORD_BYTES >> 20} MiB"
                    ) from None
                self._more()

    def _scan(self, begin: int) -> int:
        buffer = self._buffer
        if buffer[begin] not in b'{["':
            literal = _LITERAL.match(buffer, begin)
            if literal is None:
                raise self._broken(begin, f"{quoted(self._text(begin))} cannot stand here")
            if literal.end() == len(buffer) and not self._at_end:
                raise _Incomplete
            return literal.end()
        expected = bytearray()
        for match in _TOKEN.finditer(buffer, begin):
            start, end = match.span()
            byte = buffer[start]
            if byte == 0x22:
                if end - start == 1:
                    self._check_string(start)
            elif byte in _CLOSES:
                expected.append(_CLOSES[byte])
                continue
            elif not expected or expected.pop() != byte:
                raise self._broken(start, f"{chr(byte)!r} closes nothing")
            if not expected:
                return end
        if self._at_end:
            raise self._broken(begin, "the file ends inside the record that starts here")
        raise _Incomplete

    def _check_string(self, start: int) -> None:
        """Whether a quote without its partner is an error or only needs more of the file."""
        string = _OPEN_STRING.match(self._buffer, start)
        assert string is not None
        reached = string.end()
        # A backslash at the very end may begin an escape.
        goes_on = self._buffer[reached:] in (b"", b"\\")
        if goes_on and not self._at_end:
            raise _Incomplete
        if goes_on:
            raise self._broken(start, "the file ends inside the text that starts here")
        raise self._broken(reached, "a text is not closed before the end of its line")

    def _peek(self) -> bytes | None:
        """The next byte that is no white space, without taking it; None at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at : self._at + 1]
            if self._at_end:
                return None
            self._more()

    def _more(self) -> None:
        self._line_of(self._at)
        self._base += self._at
        held = self._buffer[self._at :]
        # Doubling keeps long records from being scanned again and again.
        read = self._file.read(max(CHUNK_BYTES, len(held)))
        self._at_end = not read
        self._buffer = held + read
        self._at = self._counted = 0

    def _line_of(self, at: int) -> int:
        """The line (from 1) of byte `at` of the buffer; asked in rising order."""
        self._lines += self._buffer.count(b"\n", self._counted, at)
        self._counted = at
        return self._lines + 1

    def _text(self, at: int) -> str:
        return self._buffer[at : at + 20].decode("utf-8", "replace")

    def _broken(self, at: int, problem: str) -> ConfigError:
        return ConfigError(
            f"{self._path}: broken JSON at line {self._line_of(at):,} "
            f"(record {self._number + 1:,}, byte {self._base + at:,}): {problem}.",
            hint="Download the file again, or correct this place; what was prepared is kept.",
        )
