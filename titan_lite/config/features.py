"""The README's table of features, from the registry: each choice of each slot, how to ask for it, and its source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any, Final, NamedTuple

from titan_lite.config.component import SlotConfig
from titan_lite.config.errors import ConfigError
from titan_lite.config.paths import Path, key_text
from titan_lite.config.schema import Table, is_list, is_slot, item_of, literals, members, table_of
from titan_lite.config.toml import value_text

BEGIN: Final = "<!-- features: written by `python -m titan_lite.config --features README.md` -->"
NOTHING: Final = "none"
"""The type of what leaves a part out, and needs no source."""
END: Final = "<!-- end of features -->"

_SOURCE = re.compile(r"\bSource:\s+(.*?)\.?\s*(?:\n\s*\n|$)", re.DOTALL)
_SENTENCE = re.compile(r"(.*?\.)(?:\s|$)", re.DOTALL)
_ARXIV = re.compile(r"\barXiv (\d{4}\.\d{4,5})\b")


class Place(NamedTuple):
    """Where a slot stands in the file."""

    family: type[SlotConfig]
    path: Path
    around: tuple[tuple[Path, type[SlotConfig]], ...]
    """The choices of other slots inside which it stands, outermost first."""
    others: tuple[Any, ...] | None
    """What a list of choices holds by default; None where the slot takes a single choice."""


def places(root: Table, path: Path) -> list[Place]:
    """Every place of a slot in and below a table, those on the surface first; a slot inside itself is left out."""
    found: dict[Path, Place] = {}
    todo: list[tuple[Table, Path, tuple[tuple[Path, type[SlotConfig]], ...]]] = [(root, path, ())]
    while todo:
        table, here, around = todo.pop(0)
        for name, field in table.model_fields.items():
            place = (*here, name)
            many = is_list(field.annotation)
            below = table_of(item_of(field.annotation) if many else field.annotation)
            if below is None or place in found or any(issubclass(choice, below) for _, choice in around):
                continue
            if not is_slot(below):
                todo.extend([(below, place, around)] * (not many))
                continue
            assert issubclass(below, SlotConfig)
            found[place] = Place(below, place, around, tuple(field.default) if many else None)
            for _, choice in choices(below):
                todo.append((choice, place, (*around, (place, choice))))
    return list(found.values())


def choices(family: type[SlotConfig]) -> list[tuple[str, type[SlotConfig]]]:
    """The choices of a slot, the default first."""
    return sorted(family.choices.items(), key=lambda item: (item[0] != family.default_type, item[0]))


def example_table(choice: type[SlotConfig]) -> dict[str, Any]:
    """A table that makes the choice: its type, and of each key that must be set the first of its `examples` or names.

    LookupError where there are none.
    """
    table: dict[str, Any] = {"type": choice.model_fields["type"].default}
    for name, field in choice.model_fields.items():
        if field.is_required():
            named = [value for member in members(field.annotation) for value in literals(member)]
            if not (found := field.examples or named):
                raise LookupError(f"{choice.__qualname__}.{name} must be set and has no example: Field(examples=[...])")
            table[name] = found[0]
    return table


def example(place: Place, choice: type[SlotConfig]) -> tuple[Path, Any]:
    """A setting (key, value) that makes the choice."""
    value: Any = _short(example_table(choice))
    if place.others is not None:
        names = [other.type for other in place.others]
        value = [*names, *([] if value in names else [value])]
    path = place.path
    for around_path, around in reversed(place.around):
        if around.model_fields["type"].default != around.default_type:
            table: dict[str, Any] = example_table(around)
            inner = table
            for part in path[len(around_path) : -1]:
                inner = inner.setdefault(str(part), {})
            inner[str(path[-1])] = value
            path, value = around_path, table
    return path, value


def _short(table: dict[str, Any]) -> Any:
    """The bare name of a type where nothing else is said."""
    return table["type"] if set(table) == {"type"} else table


def rows(root: Table, path: Path) -> Iterator[tuple[str, str, str, str]]:
    """(feature, TOML, what it is, source) of every choice of every slot in and below a table, absent parts left out."""
    first: dict[type[SlotConfig], Place] = {}
    for place in places(root, path):
        first.setdefault(place.family, place)
    for place in first.values():
        for name, choice in choices(place.family):
            what, source = documented(choice)
            if source or name != NOTHING:
                key, value = example(place, choice)
                yield f"{place.family.slot} {name}", f"{key_text(key)} = {value_text(value)}", what, source


def documented(choice: type[SlotConfig]) -> tuple[str, str]:
    """First sentence and source of the component's docstring; empty where it has none."""
    text = choice.component.__dict__.get("__doc__") or ""
    sentence, source = _SENTENCE.match(text.strip()), _SOURCE.search(text)
    return (_line(sentence[1]) if sentence else ""), (_line(source[1]) if source else "")


def _line(text: str) -> str:
    return " ".join(text.split())


def feature_table(root: Table, path: Path) -> str:
    """All rows as a Markdown table."""
    lines = ["| feature | TOML | what it is | source |", "|---|---|---|---|"]
    for feature, toml, what, source in rows(root, path):
        linked = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", source)
        cells = (feature, f"`{toml}`", what, linked)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def write_features(file: FilePath, table: str) -> None:
    """Replaces what stands between the marks of a Markdown file. ConfigError where it has none."""
    text = file.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError.at(str(file), "has no place for the table", allowed=f"a line {BEGIN!r} and a line {END!r}")
    file.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")
