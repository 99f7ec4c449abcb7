"""Writes tables as TOML."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from titan_lite.config.paths import Path, key_text, quoted

_TABLE, _ARRAY = "[{}]", "[[{}]]"


def toml_text(tables: Mapping[str, Any]) -> str:
    """A document that reads back as the same tables. None is left out: TOML has no null."""
    return "\n".join(_lines(tables, ())) + "\n"


def _lines(table: Mapping[str, Any], path: Path, header: str = _TABLE) -> Iterator[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping) or _is_nested(value)}
    values = {key: value for key, value in table.items() if value is not None and key not in inner}
    if path and (values or not table or header != _TABLE):
        yield header.format(key_text(path))
    for key, value in values.items():
        yield f"{key_text((key,))} = {value_text(value)}"
    if values or not table:
        yield ""
    for key, value in inner.items():
        if isinstance(value, Mapping):
            yield from _lines(value, (*path, key))
        else:
            for item in value:
                yield from _lines(item, (*path, key), _ARRAY)


def _is_nested(value: Any) -> bool:
    """Whether it is an array of tables that hold tables, which do not fit on one line."""
    return (
        isinstance(value, (list, tuple))
        and all(isinstance(item, Mapping) for item in value)
        and any(isinstance(inner, Mapping) for item in value for inner in item.values())
    )


def value_text(value: Any) -> str:
    """A value on one line; tables inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, float):
        return ("inf" if value > 0 else "-inf") if math.isinf(value) else repr(value)
    if isinstance(value, Mapping):
        pairs = (f"{key_text((key,))} = {value_text(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    return str(value)
