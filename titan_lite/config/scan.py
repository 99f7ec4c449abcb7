"""Lines of the keys of a valid TOML document: tomllib gives values without positions, this positions without values."""

from __future__ import annotations

import sys
from typing import Any

from titan_lite.config.paths import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def key_lines(text: str) -> dict[Path, int]:
    """{place: line, counted from 1} of every key, table and array item of a document that tomllib accepts."""
    return _Scanner(text.replace("\r\n", "\n")).document()


def _parts(raw: str) -> tuple[str, ...]:
    """The parts of a key as it is written: `a."b.c"` -> ("a", "b.c")."""
    parts: list[str] = []
    table: Any = tomllib.loads(f"{raw} = 0")
    while isinstance(table, dict):
        ((part, table),) = table.items()
        parts.append(part)
    return tuple(parts)


class _Scanner:
    """One pass over the text; `at` is the index of the next character. Relies on the document being valid."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.arrays: dict[Path, int] = {}
        """Place of each array of tables -> index of its last table."""
        self.line = 1
        self.counted = 0

    def document(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip_blank():
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)
        return self.lines

    def _header(self) -> Path:
        line = self._line()
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        raw = self._raw_key("]")
        self.at += 2 if is_array else 1
        place: Path = ()
        parts = _parts(raw)
        for i, part in enumerate(parts):
            place = (*place, part)
            self.lines.setdefault(place, line)
            if is_array and i == len(parts) - 1:
                self.arrays[place] = self.arrays.get(place, -1) + 1
            if place in self.arrays:
                place = (*place, self.arrays[place])
        self.lines[place] = line
        return place

    def _pair(self, table: Path) -> None:
        line = self._line()
        place = table
        for part in _parts(self._raw_key("=")):
            place = (*place, part)
            self.lines.setdefault(place, line)
        self.at += 1
        self._skip_spaces()
        self._value(place)

    def _raw_key(self, end: str) -> str:
        """The text up to `end` outside quotes; leaves `at` on `end`."""
        start = self.at
        while self._peek() != end:
            if self._peek() in "\"'":
                self._string()
            else:
                self.at += 1
        return self.text[start : self.at].strip()

    def _value(self, place: Path) -> None:
        character = self._peek()
        if character in "\"'":
            self._string()
        elif character == "[":
            self._array(place)
        elif character == "{":
            self._inline_table(place)
        else:
            while self.at < len(self.text) and self._peek() not in ",]}#\n":
                self.at += 1

    def _array(self, place: Path) -> None:
        self.at += 1
        index = 0
        while self._skip_blank() and self._peek() != "]":
            self.lines[(*place, index)] = self._line()
            self._value((*place, index))
            index += 1
            self._skip_blank()
            if self._peek() == ",":
                self.at += 1
        self.at += 1

    def _inline_table(self, place: Path) -> None:
        self.at += 1
        while self._skip_blank() and self._peek() != "}":
            self._pair(place)
            self._skip_blank()
            if self._peek() == ",":
                self.at += 1
        self.at += 1

    def _string(self) -> None:
        quote = self._peek()
        if self.text.startswith(quote * 3, self.at):
            self.at += 3
            self._skip_to(quote * 3, quote)
            while self._peek() == quote:  # up to two quotes may stand before the closing three
                self.at += 1
        else:
            self.at += 1
            self._skip_to(quote, quote)

    def _skip_to(self, end: str, quote: str) -> None:
        while not self.text.startswith(end, self.at):
            self.at += 2 if quote == '"' and self._peek() == "\\" else 1
        self.at += len(end)

    def _skip_spaces(self) -> None:
        while self._peek() in (" ", "\t"):
            self.at += 1

    def _skip_blank(self) -> bool:
        """Skips white space, line ends and comments; False at the end of the text."""
        while self.at < len(self.text):
            if self._peek() == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self._peek() in " \t\n":
                self.at += 1
            else:
                return True
        return False

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _line(self) -> int:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line
