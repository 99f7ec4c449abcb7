"""Full keys such as `model.layers[0].attention.type`: how they are written, and where in which file they stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Path: TypeAlias = tuple[str | int, ...]
"""A place in nested tables: keys and list indices."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


class Origin(NamedTuple):
    """Where a key was set; line 0 = the place has no lines (the command line)."""

    file: str
    line: int


Origins: TypeAlias = dict[Path, Origin]


def key_text(path: Sequence[str | int]) -> str:
    """The full key of a place, as problems show it."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _BARE.fullmatch(part) else quoted(part))
    return text


def quoted(text: str) -> str:
    """A TOML basic string."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else _unicode_escape(c)) for c in text) + '"'


def _unicode_escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"


def parse_key(text: str) -> Path:
    """The inverse of `key_text` for keys of bare parts and indices."""
    return tuple(int(part[1:-1]) if part[0] == "[" else part for part in re.findall(r"[^.\[\]]+|\[\d+\]", text))


def nearest_origin(origins: Origins, path: Path) -> Origin | None:
    """Where `path` was set, or else the innermost table around it that was."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return None


def get(tables: Mapping[str, Any], path: Path) -> Any:
    """The value at `path`; KeyError where there is none."""
    value: Any = tables
    for part in path:
        items = range(len(value)) if isinstance(value, (list, tuple)) else value if isinstance(value, Mapping) else ()
        if part not in items:
            raise KeyError(key_text(path))
        value = value[part]
    return value


def put(tables: dict[str, Any], path: Path, value: Any) -> None:
    """Sets the value at `path`, making tables on the way; KeyError where something else than a table is in the way."""
    table = tables
    for part in path[:-1]:
        table = table.setdefault(part, {})  # type: ignore[arg-type]
        if not isinstance(table, dict):
            raise KeyError(key_text(path))
    table[path[-1]] = value  # type: ignore[index]


def forget(origins: Origins, path: Path) -> None:
    """Removes the origins of `path` and of everything below it."""
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
