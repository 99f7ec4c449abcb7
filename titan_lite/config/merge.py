"""Layers of a config and how one overrides another: tables merge, arrays and values replace."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from titan_lite.config.paths import Origins, Path, forget
from titan_lite.config.schema import Table, classes_of, is_slot, slot_type, table_of


@dataclass
class Layer:
    """The tables of one file (or preset, or the command line) and where each of their keys stands."""

    tables: dict[str, Any] = field(default_factory=dict)
    origins: Origins = field(default_factory=dict)


def merged(layers: list[Layer], root: Table) -> Layer:
    """One layer in which later layers win. The given ones are left as they are."""
    out = Layer()
    for layer in layers:
        _merge(out, out.tables, layer.tables, root, ())
        out.origins.update(layer.origins)
    return out


def _merge(out: Layer, lower: dict[str, Any], upper: Mapping[str, Any], table: Table | None, path: Path) -> None:
    for key, value in upper.items():
        place = (*path, key)
        below = _table_at(table, key, {**lower, **upper})
        old, new = _as_table(below, lower.get(key)), _as_table(below, value)
        both = isinstance(old, dict) and isinstance(new, dict)
        if both and not _changes_type(below, old, new):
            lower[key] = old
            _merge(out, old, new, below, place)
        else:
            forget(out.origins, place)
            lower[key] = copy.deepcopy(new)


def _table_at(table: Table | None, key: str, value: Mapping[str, Any]) -> Table | None:
    """The class of the table at `key`, as far as the schema knows it."""
    if table is None:
        return None
    for cls in classes_of(table, value):
        if key in cls.model_fields:
            return table_of(cls.model_fields[key].annotation)
    return None


def _as_table(table: Table | None, value: Any) -> Any:
    """A slot's bare type name as the table it stands for."""
    return {"type": value} if is_slot(table) and isinstance(value, str) else value


def _changes_type(table: Table | None, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the new table chooses another type, so that the old type's keys make no sense any more."""
    if table is None or not is_slot(table) or "type" not in new:
        return False
    return bool(slot_type(table, old) != new["type"])
