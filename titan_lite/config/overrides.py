"""`--section.key=value` on the command line as the topmost layer of a config."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from titan_lite.config.aliases import renamed
from titan_lite.config.errors import BAD_OVERRIDE, COMMAND_LINE, Problem, show
from titan_lite.config.merge import Layer
from titan_lite.config.paths import Origin, Path, get, key_text, put
from titan_lite.config.reader import DEEPEST, depth
from titan_lite.config.schema import Table, bare, field_at, is_list, is_slot, is_text, item_of, members, table_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PART = re.compile(r"[A-Za-z0-9_-]+")


def command_line_layer(arguments: Sequence[str], root: Table, below: Mapping[str, Any]) -> tuple[Layer, list[Problem]]:
    """The layer of the overrides, later ones winning; `below` are the tables they override, with the types of slots."""
    layer = Layer()
    problems: list[Problem] = []
    todo = list(arguments)
    while todo:
        argument = todo.pop(0)
        if not _is_unicode(argument):
            problems.append(_problem("", f"{show(argument)} is not valid UTF-8"))
            continue
        name, equals, raw = argument.partition("=")
        parts = name[2:].split(".")
        path: Path = tuple(parts)
        if not name.startswith("--") or not all(_PART.fullmatch(part) for part in parts):
            why = f"{show(argument)} is not an override"
            problems.append(_problem("", why, allowed="--section.key=value or --section.key value"))
            continue
        field = _field(root, path, below, layer)
        if equals:
            value = parse(raw, field)
        elif _is_bool(field):
            value = todo.pop(0) == "true" if todo and todo[0] in ("true", "false") else True
        elif field is None and (positive := _negated(path)) and _is_bool(_field(root, positive, below, layer)):
            path, value = positive, False
        elif todo and not todo[0].startswith("--") and _is_unicode(todo[0]):
            value = parse(todo.pop(0), field)
        else:
            problems.append(_problem(key_text(path), "has no value", allowed=f"{name}=value or {name} value"))
            continue
        _set(layer, path, value, problems)
    return layer, problems


def _is_unicode(argument: str) -> bool:
    """False for bytes of the command line that Python could not decode: lone surrogates stand for them."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def parse(raw: str, field: FieldInfo | None) -> Any:
    """The value that the text of an override stands for: as it is where the key takes a string, else a TOML value.

    Text that is no TOML value stays text, so that the schema says what it expected.
    """
    return _toml(raw) if field is None else _parse(raw, field.annotation)


def _parse(raw: str, annotation: Any) -> Any:
    if is_text(annotation):
        return raw
    if is_list(annotation) and not raw.startswith("["):
        return [_parse(part.strip(), item_of(annotation)) for part in raw.split(",")] if raw else []
    if raw.startswith(("{", "[")):
        return _toml(raw)
    if is_slot(table_of(annotation)):
        return {"type": raw}
    return raw if str in members(bare(annotation)) else _toml(raw)


def _toml(raw: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    return tables["value"] if set(tables) == {"value"} and depth(tables) <= DEEPEST else raw


def _field(root: Table, path: Path, below: Mapping[str, Any], layer: Layer) -> FieldInfo | None:
    """The field of a key, old spellings included; types that overrides chose come before those of `below`."""
    path = renamed(path)
    return field_at(root, path, layer.tables) if _has_table(layer, path) else field_at(root, path, below)


def _has_table(layer: Layer, path: Path) -> bool:
    try:
        get(layer.tables, (*path[:-1], "type"))
    except KeyError:
        return False
    return True


def _is_bool(field: FieldInfo | None) -> bool:
    return field is not None and bare(field.annotation) is bool


def _negated(path: Path) -> Path:
    """`checkpoint.no_enable` -> `checkpoint.enable`; () where nothing is negated."""
    last = str(path[-1])
    return (*path[:-1], last.removeprefix("no_")) if last.startswith("no_") else ()


def _set(layer: Layer, path: Path, value: Any, problems: list[Problem]) -> None:
    try:
        table = get(layer.tables, path)
    except KeyError:
        table = None
    try:
        put(layer.tables, path, {**table, **value} if isinstance(table, dict) and isinstance(value, dict) else value)
    except KeyError:
        why = "cannot be set inside a value that another override sets as a whole"
        problems.append(_problem(key_text(path), why))
        return
    for length in range(1, len(path) + 1):
        layer.origins[path[:length]] = Origin(COMMAND_LINE, 0)


def _problem(key: str, why: str, allowed: str = "") -> Problem:
    return Problem(BAD_OVERRIDE, key, why, allowed=allowed, file=COMMAND_LINE)
