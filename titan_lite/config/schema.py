"""Questions to the config's classes: what may stand at a key, which choice a slot's table makes, how a type reads."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from titan_lite.config.component import ConfigBase, SlotConfig
from titan_lite.config.paths import Path

Table: TypeAlias = type[ConfigBase]

_NAMES = {int: "int", float: "float", str: "string", bool: "bool"}


def bare(annotation: Any) -> Any:
    """The annotation without `Annotated[...]` and `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif len(rest := members(annotation)) == 1 and rest[0] is not annotation:
            annotation = rest[0]
        else:
            return annotation


def members(annotation: Any) -> list[Any]:
    """The members of a union, without None; of anything else, itself."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    return [member for member in get_args(annotation) if member is not type(None)]


def is_list(annotation: Any) -> bool:
    """Whether the key takes a TOML array."""
    return get_origin(bare(annotation)) in (tuple, list)


def item_of(annotation: Any) -> Any:
    """The annotation of a list's items."""
    return get_args(bare(annotation))[0]


def literals(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal; () where the key is none."""
    annotation = bare(annotation)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def is_text(annotation: Any) -> bool:
    """Whether every value of the key is a string."""
    return bare(annotation) is str or (
        bool(literals(annotation)) and all(isinstance(v, str) for v in literals(annotation))
    )


def table_of(annotation: Any) -> Table | None:
    """The Config class (a slot's family for a slot) whose table may stand here."""
    annotation = bare(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, ConfigBase) else None


def is_slot(table: Table | None) -> bool:
    """Whether the class is a slot's family, which a `type` must make one of its choices."""
    return table is not None and issubclass(table, SlotConfig) and "slot" in vars(table)


def slot_type(family: Table, value: Any) -> Any:
    """The type that a slot's value names; the default where it names none."""
    assert issubclass(family, SlotConfig)
    return value if isinstance(value, str) else value.get("type", family.default_type)


def classes_of(table: Table, value: Any) -> list[Table]:
    """The classes whose fields the table may have: its own, the chosen type's, or all types' where none is known."""
    if not is_slot(table):
        return [table]
    assert issubclass(table, SlotConfig)
    name = slot_type(table, value) if isinstance(value, (str, Mapping)) else table.default_type
    return [table.choices[name]] if isinstance(name, str) and name in table.choices else list(table.choices.values())


def field_at(root: Table, path: Path, tables: Any) -> FieldInfo | None:
    """The field at `path`, given the tables around it (they say which type a slot has); None for no such key.

    A key that only another type of a slot has is found too: its table may be about to change type.
    """
    found: FieldInfo | None = None
    annotation: Any = root
    value = tables
    for part in path:
        if isinstance(part, int):
            if not is_list(annotation):
                return None
            annotation = item_of(annotation)
            value = value[part] if isinstance(value, (list, tuple)) and part < len(value) else {}
            continue
        table = table_of(annotation)
        if table is None:
            return None
        everywhere = [*classes_of(table, value), *classes_of(table, {"type": None})]
        fields = [c.model_fields[part] for c in everywhere if part in c.model_fields]
        if not fields:
            return None
        found, annotation = fields[0], fields[0].annotation
        value = value.get(part, {}) if isinstance(value, Mapping) else {}
    return found


def describe(annotation: Any) -> str:
    """A type in words: `int`, `list of string`, `"a" or "b"`, `table (norm)`."""
    annotation = bare(annotation)
    if literals(annotation):
        return " or ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in literals(annotation))
    if is_list(annotation):
        return f"list of {describe(item_of(annotation))}"
    table = table_of(annotation)
    if table is not None:
        return f"table or type of {table.slot}" if is_slot(table) and issubclass(table, SlotConfig) else "table"
    if len(members(annotation)) > 1:
        return " or ".join(describe(member) for member in members(annotation))
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def range_of(field: FieldInfo) -> str:
    """The bounds of a numeric field, such as `0 <= value < 1`; empty where it has none."""
    return _bounds([*field.metadata, *_annotated(field.annotation)])


def _annotated(annotation: Any) -> Iterator[Any]:
    for member in members(annotation):
        if get_origin(member) is Annotated:
            yield from get_args(member)[1:]
            yield from _annotated(get_args(member)[0])


def _bounds(metadata: Iterable[Any]) -> str:
    low = high = ""
    for item in (leaf for entry in metadata for leaf in (entry.metadata if isinstance(entry, FieldInfo) else [entry])):
        if isinstance(item, annotated_types.Gt):
            low = f"{item.gt} < "
        elif isinstance(item, annotated_types.Ge):
            low = f"{item.ge} <= "
        elif isinstance(item, annotated_types.Lt):
            high = f" < {item.lt}"
        elif isinstance(item, annotated_types.Le):
            high = f" <= {item.le}"
    return f"{low}value{high}" if low or high else ""


def all_keys(table: Table, prefix: Path = ()) -> Iterator[Path]:
    """Every key below a table, of every type of every slot (the same key may come more than once)."""
    for cls in classes_of(table, {"type": None}):
        for name, field in cls.model_fields.items():
            yield (*prefix, name)
            below = table_of(field.annotation)
            if below is not None:
                yield from all_keys(below, (*prefix, name))


def nearest(name: object, candidates: Iterable[object]) -> str:
    """The candidate that `name` is probably a slip of; empty where none is near."""
    names = {str(c).lower(): str(c) for c in candidates}
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.6)
    return names[close[0]] if close else ""
