"""From pydantic's errors to problems in the user's words."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import (
    CODES,
    KEY_MISSING,
    MISSING,
    NOT_ALLOWED,
    UNKNOWN_KEY,
    UNKNOWN_TYPE,
    WRONG_TYPE,
    Problem,
    show,
)
from titan_lite.config.paths import Path, get, key_text
from titan_lite.config.schema import (
    Table,
    all_keys,
    classes_of,
    describe,
    field_at,
    is_list,
    item_of,
    literals,
    nearest,
    range_of,
    table_of,
)

_OUT_OF_RANGE = frozenset(
    {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "too_short", "too_long"}
)


def problems_of(error: ValidationError, root: Table, tables: Mapping[str, Any]) -> list[tuple[Path, Problem]]:
    """(place, problem) of everything pydantic found, one per place. A list with a wrong item is not also too short."""
    tables = _with_types(tables)
    found: dict[Path, Problem] = {}
    for details in error.errors(include_url=False):
        path = _place(details, tables)
        if path not in found:  # a union reports once for each of its members
            found[path] = _problem(details, path, root, tables)
    wrong_items = {path[:-1] for path in found if path and isinstance(path[-1], int)}
    return [(path, problem) for path, problem in found.items() if path not in wrong_items]


def _with_types(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tables with each `type` that an entry of model.layers leaves to the model-wide table."""
    model = tables.get("model")
    entries = model.get("layers") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(entries, list):
        return tables
    return {**tables, "model": {**model, "layers": [_typed(entry, model) for entry in entries]}}


def _typed(upper: Any, lower: Any) -> Any:
    lower = {"type": lower} if isinstance(lower, str) else lower
    if not (isinstance(upper, Mapping) and isinstance(lower, Mapping)):
        return upper
    type_ = lower.get("type")
    if upper.get("type", type_) != type_:
        return upper
    inner = {key: _typed(value, lower.get(key)) for key, value in upper.items()}
    return inner if type_ is None else {"type": type_, **inner}


def _place(details: ErrorDetails, tables: Any) -> Path:
    """The error's place in the user's tables: pydantic's location without its own marks, such as members of unions."""
    path: Path = ()
    for part in details["loc"]:
        try:
            get(tables, (*path, part))
        except KeyError:
            continue
        path = (*path, part)
    return (*path, details["loc"][-1]) if details["type"] == "missing" else path


def _problem(details: ErrorDetails, path: Path, root: Table, tables: Mapping[str, Any]) -> Problem:
    key = key_text(path)
    try:
        value = get(tables, path)
    except KeyError:
        value = MISSING
    context = details.get("ctx", {})
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, root, tables)
    if kind == "missing":
        return Problem(KEY_MISSING, key, "must be set")
    if kind == "slot_type":
        return _unknown_type(key, value, context)
    if kind == "refused":
        return Problem(NOT_ALLOWED, key, context["problem"], value, context["allowed"])
    field = field_at(root, path, tables)
    annotation = _annotation(root, path, tables)
    if kind == "literal_error":
        choices = literals(annotation)
        return Problem(
            NOT_ALLOWED, key, "is not one of the choices", value, describe(annotation), nearest(value, choices)
        )
    if kind in _OUT_OF_RANGE:
        why = "must be a finite number" if kind == "finite_number" else f"is {CODES[NOT_ALLOWED]}"
        why = "has too few or too many items" if kind.startswith("too_") else why.replace("value out", "out")
        return Problem(NOT_ALLOWED, key, why, value, range_of(field) if field else "")
    if kind == "value_error":
        return Problem(NOT_ALLOWED, key, str(context.get("error", details["msg"])), value)
    expected = "table" if annotation is None else describe(annotation)
    return Problem(WRONG_TYPE, key, f"expected {expected}, got {show(value)} ({type_name(value)})", value)


def _annotation(root: Table, path: Path, tables: Mapping[str, Any]) -> Any:
    """The annotation of the key, or of the list item, at `path`."""
    indices = 0
    while path and isinstance(path[-1], int):
        path, indices = path[:-1], indices + 1
    field = field_at(root, path, tables)
    annotation = None if field is None else field.annotation
    for _ in range(indices):
        annotation = item_of(annotation) if is_list(annotation) else None
    return annotation


def _unknown_key(path: Path, root: Table, tables: Mapping[str, Any]) -> Problem:
    *around, name = path
    parent = tuple(around)
    table = table_of(_annotation(root, parent, tables)) if parent else root
    value = get(tables, path)
    shown = MISSING if isinstance(value, Mapping) else value
    names = _names(table, get(tables, parent) if parent else tables)
    why = "unknown key" if parent else "unknown section"
    owner = _owner(table, name)
    if owner:
        return Problem(UNKNOWN_KEY, key_text(path), f"{why}: it belongs to type {owner}", shown, ", ".join(names))
    near = nearest(name, names)
    if not near:
        elsewhere = {key_text(key) for key in all_keys(root) if key[-1] == name}
        near = min(elsewhere, key=len, default="")
    return Problem(UNKNOWN_KEY, key_text(path), why, shown, ", ".join(names), near)


def _names(table: Table | None, value: Any) -> list[str]:
    classes = [] if table is None else classes_of(table, value)
    return list(dict.fromkeys(name for cls in classes for name in cls.model_fields))


def _owner(table: Table | None, name: object) -> str:
    """The other types of a slot that do have the key."""
    if table is None or not issubclass(table, SlotConfig):
        return ""
    return " or ".join(f'"{type_}"' for type_, cls in table.choices.items() if name in cls.model_fields)


def _unknown_type(key: str, table: Any, context: Mapping[str, Any]) -> Problem:
    allowed: Iterable[str] = context["allowed"]
    name = table.get("type") if isinstance(table, Mapping) else table
    if name is None:
        return Problem(KEY_MISSING, f"{key}.type", "must be set", allowed=", ".join(allowed))
    return Problem(UNKNOWN_TYPE, f"{key}.type", context["problem"], name, ", ".join(allowed), nearest(name, allowed))


def type_name(value: Any) -> str:
    """The TOML type of a value."""
    for python, name in (
        (bool, "bool"),
        (int, "int"),
        (float, "float"),
        (str, "string"),
        (Mapping, "table"),
        ((list, tuple), "list"),
        ((datetime.date, datetime.time), "date or time"),
    ):
        if isinstance(value, python):
            return name
    return type(value).__name__
