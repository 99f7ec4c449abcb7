"""One TOML file as a layer: its tables, the line of each key, and whatever is wrong with it as TOML."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Final

from titan_lite.config.errors import (
    BAD_BASE,
    FILE_MISSING,
    MISSING,
    TOML_SYNTAX,
    WRONG_TYPE,
    ConfigError,
    Problem,
    show,
)
from titan_lite.config.merge import Layer
from titan_lite.config.paths import Origin
from titan_lite.config.scan import key_lines
from titan_lite.config.translate import type_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST: Final = 1 << 20
"""Bytes of the largest config read: 1 MiB."""
DEEPEST: Final = 100
"""Levels of tables and arrays."""

_SHOWN = 100
_PLACE = re.compile(r" ?\(at (?:line (\d+), column \d+|(end of document))\)")
_IN_OTHER_WORDS: Final = {
    "Cannot overwrite a value": "the key is set twice",
    "Cannot mutate immutable namespace": "an inline table or array cannot be added to",
    "Cannot declare": "the table is declared twice",
}


def read_chain(path: str | FilePath) -> list[Layer]:
    """The layers of a file and of its bases, lowest first. ConfigError for a file that cannot be read."""
    layers: list[Layer] = []
    seen: list[FilePath] = []
    file, named_by = FilePath(path), None
    while True:
        if file.resolve() in seen:
            assert named_by is not None
            names = " -> ".join(f.name for f in [*seen, file])
            raise _error(
                BAD_BASE,
                named_by,
                f"the files inherit from each other in a circle: {names}",
                key="base",
                value=str(file),
            )
        seen.append(file.resolve())
        layer = read_file(file, named_by)
        layers.insert(0, layer)
        base = layer.tables.pop("base", None)
        if base is None:
            return layers
        named_by = layer.origins.pop(("base",))
        if not isinstance(base, str):
            why = f"expected string, got {show(base)} ({type_name(base)})"
            raise _error(WRONG_TYPE, named_by, why, key="base", value=base)
        if not base or "\0" in base:
            raise _error(BAD_BASE, named_by, "must be the path of a file, relative to this one", key="base", value=base)
        file = file.parent / base


def read_file(file: FilePath, named_by: Origin | None = None) -> Layer:
    """The layer of one file; `named_by` is the place of the `base` key that names it, None for the user's file."""
    text = _text(file, named_by)
    tables = _tables(text, str(file))
    lines = key_lines(text)
    for path, line in lines.items():
        if len(path) > DEEPEST:
            raise _error(TOML_SYNTAX, Origin(str(file), line), f"tables are nested deeper than {DEEPEST} levels")
    return Layer(tables, {path: Origin(str(file), line) for path, line in lines.items()})


def _text(file: FilePath, named_by: Origin | None) -> str:
    key = "base" if named_by else "config file"
    try:
        with file.open("rb") as stream:
            raw = stream.read(LARGEST + 1)
    except FileNotFoundError:
        raise _error(FILE_MISSING, named_by, "there is no such file", key=key, value=str(file)) from None
    except (OSError, ValueError) as error:
        why = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise _error(FILE_MISSING, named_by, why, key=key, value=str(file)) from None
    if len(raw) > LARGEST:
        raise _error(TOML_SYNTAX, Origin(str(file), 1), f"the file is larger than {LARGEST} bytes (1 MiB)")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise _error(
            TOML_SYNTAX, Origin(str(file), 1), "the file begins with a byte order mark: save it as UTF-8 without one"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        why = f"byte {raw[error.start]:#04x} is not UTF-8 text"
        raise _error(TOML_SYNTAX, Origin(str(file), line), why) from None


def _tables(text: str, file: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(text, file) from None
    except ValueError as error:  # TOMLDecodeError, and Python's own of an integer of thousands of digits
        raise _syntax_error(str(error), text, file) from None
    if depth(tables) > DEEPEST:
        raise _too_deep(text, file)
    return tables


def _syntax_error(message: str, text: str, file: str) -> ConfigError:
    found = _PLACE.search(message)
    lines = text.split("\n")
    line = (int(found[1]) if found[1] else len(lines)) if found else 1
    why = _PLACE.sub("", message)
    why += next((f": {words}" for start, words in _IN_OTHER_WORDS.items() if why.startswith(start)), "")
    source = lines[line - 1].strip() if line <= len(lines) else ""
    return _error(TOML_SYNTAX, Origin(file, line), f"{why}, in `{source[:_SHOWN]}`" if source else why)


def _too_deep(text: str, file: str) -> ConfigError:
    """Names the line on which the brackets that are open (those in strings included) get too many."""
    opened = 0
    line = 1
    for character in text:
        line += character == "\n"
        opened += (character in "[{") - (character in "]}")
        if opened > DEEPEST:
            break
    return _error(TOML_SYNTAX, Origin(file, line), f"arrays and tables are nested deeper than {DEEPEST} levels")


def depth(tables: Any) -> int:
    """Levels of nesting, without recursion."""
    deepest, todo = 0, [(tables, 1)]
    while todo:
        value, level = todo.pop()
        deepest = max(deepest, level)
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        todo.extend((item, level + 1) for item in items if isinstance(item, (Mapping, list)))
    return deepest


def _error(code: str, place: Origin | None, why: str, key: str = "", value: Any = MISSING) -> ConfigError:
    return ConfigError(
        [Problem(code, key, why, value, file=place.file if place else "", line=place.line if place else 0)]
    )
