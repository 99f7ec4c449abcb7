"""Config problems: what is wrong with a key or file, where it stands, what is allowed. Users see no traceback."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

EXIT_BAD_INPUT: Final = 2
"""Exit code of every entry point for a bad config or bad input."""

UNKNOWN_KEY: Final = "E001"
WRONG_TYPE: Final = "E002"
NOT_ALLOWED: Final = "E003"
UNKNOWN_TYPE: Final = "E004"
CROSS_FIELD: Final = "E005"
FILE_MISSING: Final = "E006"
TOML_SYNTAX: Final = "E007"
UNKNOWN_PRESET: Final = "E008"
BAD_BASE: Final = "E009"
KEY_MISSING: Final = "E010"
NOT_AVAILABLE: Final = "E011"
BAD_OVERRIDE: Final = "E012"
BAD_INPUT: Final = "E013"
"""The code of what only turns up while a run starts (a damaged checkpoint, an empty data source)."""
NOT_HERE: Final = "E014"

CODES: Final = {
    UNKNOWN_KEY: "unknown key",
    WRONG_TYPE: "wrong type",
    NOT_ALLOWED: "value out of range",
    UNKNOWN_TYPE: "unknown component type",
    CROSS_FIELD: "settings do not fit together",
    FILE_MISSING: "file missing",
    TOML_SYNTAX: "not valid TOML",
    UNKNOWN_PRESET: "unknown model preset",
    BAD_BASE: "bad base file",
    KEY_MISSING: "key missing",
    NOT_AVAILABLE: "not available yet",
    BAD_OVERRIDE: "bad command-line override",
    BAD_INPUT: "bad input",
    NOT_HERE: "not on this machine",
}

COMMAND_LINE: Final = "command line"
"""Stands for a file name in the place of keys given as `--section.key=value`."""


class Missing(enum.Enum):
    """The type of MISSING, the value of a problem that has no value to show."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING
_LONGEST_VALUE = 200


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. A `key` with a leading "." is relative to the table whose `problems` yields it."""

    code: str
    key: str
    why: str
    value: Any = MISSING
    allowed: str = ""
    nearest: str = ""
    file: str = ""
    line: int = 0

    @property
    def place(self) -> str:
        """`file:line`, as far as they are known."""
        return f"{self.file}:{self.line}" if self.file and self.line else self.file

    def __str__(self) -> str:
        setting = self.key if self.value is MISSING else f"{self.key} = {show(self.value)}"
        head = "  ".join(part for part in (self.code, self.place, setting) if part)
        lines = [head, f"    {self.why}" + (f"; did you mean `{self.nearest}`?" if self.nearest else "")]
        if self.allowed:
            lines.append(f"    allowed: {self.allowed}")
        return "\n".join(printable(line) for text in lines for line in text.split("\n"))

    def as_dict(self) -> dict[str, Any]:
        """For `check_config.py --json`; `value` is as it would stand in TOML, absent where there is none."""
        out: dict[str, Any] = {"code": self.code, "file": self.file, "line": self.line, "key": self.key}
        if self.value is not MISSING:
            out["value"] = show(self.value)
        return out | {"why": self.why, "allowed": self.allowed, "nearest": self.nearest}


Problems: TypeAlias = Iterable[Problem]


class ConfigError(Exception):
    """The user's config or input is wrong: carries every problem found. Entry points print it and exit with 2."""

    warnings: tuple[str, ...] = ()
    """What else there was to say about the config."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__(self.problems)  # as the only argument, so that the error pickles from a worker process

    @classmethod
    def at(
        cls, key: str, why: str, value: Any = MISSING, allowed: str = "", nearest: str = "", code: str = BAD_INPUT
    ) -> ConfigError:
        """The error of one problem; `key` is the full key, or the file it is about."""
        return cls([Problem(code, key, why, value, allowed, nearest)])

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def printable(text: str) -> str:
    """One line of text with whatever could touch the terminal (control characters, lone surrogates) escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(value: Any) -> str:
    """A value as it would stand in TOML, shortened."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, str):
        text = f'"{printable(value)}"'
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key} = {show(item)}" for key, item in value.items()) + "}"
    else:
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def at_place(problem: Problem, file: str, line: int) -> Problem:
    """The same problem with its place filled in, unless it already has one."""
    return problem if problem.file else replace(problem, file=file, line=line)


@contextmanager
def main_guard() -> Iterator[None]:
    """For every entry point, `@main_guard()` or `with main_guard():`; prints a ConfigError and exits with 2."""
    try:
        yield
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
