"""The config's documentation, from its own classes: JSON Schema for editors, plain text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from titan_lite.config.component import ConfigBase, SlotConfig
from titan_lite.config.errors import UNKNOWN_KEY, ConfigError
from titan_lite.config.paths import key_text, parse_key
from titan_lite.config.schema import (
    Table,
    all_keys,
    describe,
    field_at,
    is_list,
    is_slot,
    item_of,
    nearest,
    range_of,
    table_of,
)
from titan_lite.config.toml import value_text


def json_schema(root: Table) -> dict[str, Any]:
    """JSON Schema of a config file."""
    schema = root.model_json_schema()
    base = {
        "type": "string",
        "description": "File to inherit from, relative to this one: tables merge, arrays replace.",
    }
    schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def explain(key: str, root: Table) -> str:
    """Types, defaults and documentation of a section, a slot with its choices, or one key; the sections for ""."""
    if not key:
        return "\n".join(_fields(root, ""))
    field = field_at(root, parse_key(key), {})
    if field is None:
        known = dict.fromkeys(key_text(path) for path in all_keys(root))
        raise ConfigError.at(key, "unknown key", nearest=nearest(key, known), code=UNKNOWN_KEY)
    many = is_list(field.annotation)
    table = table_of(item_of(field.annotation) if many else field.annotation)
    if table is None:
        return "\n".join(_field(key, field, ""))
    head = f"[[{key}]]" if many else f"[{key}]"
    return "\n".join([f"{head}  {' '.join((field.description or '').split())}", *_table(table)])


def _table(table: Table) -> Iterator[str]:
    if not is_slot(table):
        yield from _fields(table, "  ")
        return
    assert issubclass(table, SlotConfig)
    for name, choice in table.choices.items():
        default = "  (default)" if name == table.default_type else ""
        yield f'  type = "{name}"{default}  {_first_line(choice)}'
        yield from _fields(choice, "    ")


def _first_line(choice: type[SlotConfig]) -> str:
    return (choice.component.__doc__ or "").strip().split("\n")[0]


def _fields(table: Table, indent: str) -> Iterator[str]:
    for name, field in table.model_fields.items():
        if name != "type" or not issubclass(table, SlotConfig):
            yield from _field(name, field, indent)


def _field(name: str, field: FieldInfo, indent: str) -> Iterator[str]:
    below = table_of(field.annotation)
    parts = [f"{indent}{name}", describe(field.annotation)]
    if below is None:
        parts += [_default(field), range_of(field)]
    elif is_slot(below) and issubclass(below, SlotConfig):
        parts[1] = f"table, or type: {', '.join(below.choices)}"
        default = "unset" if field.default is None else below.default_type
        parts.append(f"default {default}" if default and not field.is_required() else "required")
    yield "  ".join(part for part in parts if part)
    if field.description:
        yield f"{indent}    {' '.join(field.description.split())}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=False)
    if default is None or default is PydanticUndefined:
        return "default unset"
    if isinstance(default, (list, tuple)):
        default = [item.model_dump() if isinstance(item, ConfigBase) else item for item in default]
    return f"default {value_text(default)}"
