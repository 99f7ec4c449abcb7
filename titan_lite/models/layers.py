"""`[[model.layers]]`: tables that make some layers differ from the model-wide choices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, cast, get_args

from pydantic import ValidationError, WrapValidator
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from titan_lite.config.check import notices_below, problems_below
from titan_lite.config.component import ConfigBase, SlotConfig
from titan_lite.config.errors import MISSING, Problem, show
from titan_lite.config.merge import Layer as Tables
from titan_lite.config.merge import merged
from titan_lite.config.paths import Path, get, key_text, parse_key
from titan_lite.models.attention import Attention
from titan_lite.models.block import Block, Layer
from titan_lite.models.ffn import FFN
from titan_lite.models.linear import Linear
from titan_lite.models.norm import Norm
from titan_lite.models.residual import Residual

if TYPE_CHECKING:
    from titan_lite.job import Job
    from titan_lite.models.transformer import Transformer

SLOTS: Final = ("block", "attention", "ffn", "residual", "norm", "linear")
"""The tables a layer may have of its own; fields of `Layer`, `LayerOverride` and `Transformer.Config`."""

# A table that says only what differs: it becomes a choice of its slot when it is merged over the model-wide one.
_as_given = WrapValidator(lambda value, _: value)


class LayerOverride(ConfigBase):
    """[[model.layers]]: some layers, and what differs there from the model-wide tables."""

    at: int | str
    """Layers, counted from 0: a number (3; -1 = the last), a Python slice ("1::2"), or a list of them ("0,5:8")."""
    block: Annotated[Block.Config | None, _as_given] = None
    """What differs from [model.block]."""
    attention: Annotated[Attention.Config | None, _as_given] = None
    """What differs from [model.attention]."""
    ffn: Annotated[FFN.Config | None, _as_given] = None
    """What differs from [model.ffn]."""
    residual: Annotated[Residual.Config | None, _as_given] = None
    """What differs from [model.residual]."""
    norm: Annotated[Norm.Config | None, _as_given] = None
    """What differs from [model.norm]."""
    linear: Annotated[Linear.Config | None, _as_given] = None
    """What differs from [model.linear]."""

    def tables(self) -> dict[str, Any]:
        """The tables as they were given."""
        return {slot: value for slot in SLOTS if (value := getattr(self, slot)) is not None}


class _Choices(ConfigBase):
    """The same tables once they are whole."""

    block: Block.Config | None = None
    attention: Attention.Config | None = None
    ffn: FFN.Config | None = None
    residual: Residual.Config | None = None
    norm: Norm.Config | None = None
    linear: Linear.Config | None = None


@dataclass(frozen=True)
class Variant:
    """A choice for each slot that one layer or several have, and where it was made."""

    layer: Layer
    numbers: Sequence[int]
    """The layers that are so."""
    entries: Mapping[str, int]
    """Slot -> the last entry of model.layers that says something about it; without the model-wide slots."""

    def key(self, slot: str) -> str:
        """Full key of the table that decides the slot here."""
        return f"model.layers[{self.entries[slot]}].{slot}" if slot in self.entries else f"model.{slot}"


def selected(at: int | str, n_layers: int) -> frozenset[int]:
    """The numbers that `at` selects; ValueError where it selects none, or one that is not there."""
    numbers: set[int] = set()
    for part in str(at).split(","):
        try:
            bounds = [int(bound) if bound.strip() else None for bound in part.split(":")]
            if len(bounds) > 1:
                found = range(n_layers)[slice(*bounds)]
            else:
                (number,) = cast("list[int]", bounds)
                found = range(number, number + 1)
        except (TypeError, ValueError):
            raise ValueError(f"{part.strip()!r} is neither the number of a layer nor a slice of them") from None
        if not found:
            raise ValueError(f"{part.strip()!r} selects none of the model's {n_layers} layers (model.n_layers)")
        if not -n_layers <= found[0] < n_layers:
            raise ValueError(f"there is no layer {found[0]}: the model has {n_layers} layers (model.n_layers)")
        numbers.update(number % n_layers for number in found)
    return frozenset(numbers)


def variants(model: Transformer.Config) -> list[Variant]:
    """The different layers of a model, by their first number. ValidationError where an entry of model.layers is wrong.

    The error's places are those of the entries.
    """
    if not model.layers:
        return [Variant(_layer(model, _Choices()), range(model.n_layers), {})]
    errors: list[InitErrorDetails] = []
    chosen = [_chosen(index, entry, model.n_layers, errors) for index, entry in enumerate(model.layers)]
    users = _users(chosen, model.n_layers)
    for index, numbers in enumerate(chosen):
        if not numbers:
            users[index,] = []  # so that its tables are looked at all the same
    found = [_variant(model, entries, numbers, errors) for entries, numbers in users.items()]
    if errors:
        once = {details["loc"]: details for details in errors}
        raise ValidationError.from_exception_data("model.layers", list(once.values()))
    return found


def _users(chosen: Sequence[frozenset[int]], n_layers: int) -> dict[tuple[int, ...], list[int]]:
    """Entries, by the layers that each has chosen -> the layers for which just these speak."""
    users: dict[tuple[int, ...], list[int]] = {}
    for number in range(n_layers):
        entries = tuple(index for index, numbers in enumerate(chosen) if number in numbers)
        users.setdefault(entries, []).append(number)
    return users


def overridden(model: Transformer.Config) -> Iterator[tuple[int, str]]:
    """(entry of model.layers, slot) of each table that would have an effect if later entries did not take it back."""
    users = _users([selected(entry.at, model.n_layers) for entry in model.layers], model.n_layers)
    for index, entry in enumerate(model.layers):
        for slot in entry.tables():
            groups = [entries for entries in users if index in entries]
            mattered = any(_changes(model, slot, entries[: entries.index(index) + 1], index) for entries in groups)
            if mattered and not any(_changes(model, slot, entries, index) for entries in groups):
                yield index, slot


def _changes(model: Transformer.Config, slot: str, entries: tuple[int, ...], index: int) -> bool:
    """Whether the slot would be another one without entry `index` among these."""
    errors: list[InitErrorDetails] = []
    found = [_variant(model, chosen, (), errors) for chosen in (entries, tuple(i for i in entries if i != index))]
    one, other = (getattr(variant.layer, slot).model_dump() for variant in found)
    return bool(errors) or one != other


def _chosen(index: int, entry: LayerOverride, n_layers: int, errors: list[InitErrorDetails]) -> frozenset[int]:
    """The entry's layers; what is wrong with its `at`, so that it has none, is added to `errors`."""
    try:
        return selected(entry.at, n_layers)
    except ValueError as error:
        allowed = f'numbers from 0 to {n_layers - 1}, slices such as "1::2", or a comma-separated list of them'
        context = {"problem": str(error), "allowed": allowed}
        kind = PydanticCustomError("refused", "{problem}", context)
        errors.append({"type": kind, "loc": ("layers", index, "at"), "input": entry.at})
        return frozenset()


def _variant(
    model: Transformer.Config, entries: tuple[int, ...], numbers: Sequence[int], errors: list[InitErrorDetails]
) -> Variant:
    """The layers for which these entries speak; what is wrong with their tables is added to `errors`."""
    given = {index: model.layers[index].tables() for index in entries}
    last = {slot: index for index in entries for slot in given[index]}
    layers = [Tables({slot: getattr(model, slot).model_dump() for slot in last}), *map(Tables, given.values())]
    choices = _Choices()
    try:
        choices = _Choices.model_validate(merged(layers, LayerOverride).tables)
    except ValidationError as error:
        errors.extend(_blamed(error, given))
    return Variant(_layer(model, choices), numbers, last)


def _layer(model: Transformer.Config, choices: _Choices) -> Layer:
    own = {slot: getattr(choices, slot) or getattr(model, slot) for slot in SLOTS}
    return Layer(**own, n_layers=model.stack.depth(model.n_layers))


def _blamed(error: ValidationError, given: Mapping[int, Any]) -> Iterator[InitErrorDetails]:
    """What is wrong with a merged table, at the entry that says most about the place, the last one of several."""
    for details in error.errors(include_url=False):
        place = details["loc"]
        index = max(given, key=lambda i: (_depth(given[i], place), i))
        context = details.get("ctx", {})
        kind: Any = details["type"]
        if kind not in get_args(ErrorType):
            kind = PydanticCustomError(kind, details["msg"], context)
        yield {"type": kind, "loc": ("layers", index, *place), "input": details["input"], "ctx": context}


def _depth(tables: Mapping[str, Any], place: Path) -> int:
    """How many parts of the place the tables have."""
    for length in range(len(place), 0, -1):
        try:
            get(tables, place[:length])
        except KeyError:
            continue
        return length
    return 0


def layer_problems(model: Transformer.Config, job: Job, world_size: int | None) -> Iterator[Problem]:
    """What the tables of single layers report and the model-wide ones do not, with full keys."""
    said: list[Problem] = []
    for slot, index, table in _tables(model):
        wide = list(problems_below(getattr(model, slot), ("model", slot), job, world_size))
        for problem in problems_below(table, ("model", "layers", index, slot), job, world_size):
            key = problem.key.replace(f"model.layers[{index}].{slot}", f"model.{slot}", 1)
            mine = _where_it_was_made(problem, model, index, slot)
            if replace(problem, key=key) not in wide and mine not in said:
                said.append(mine)
    return iter(said)


def _where_it_was_made(problem: Problem, model: Transformer.Config, index: int, slot: str) -> Problem:
    """The problem at a key that entry `index` has: where it has another one that does not fit, at that one."""
    given = model.layers[index].tables()[slot]
    path = parse_key(problem.key)[4:]
    if not path or not isinstance(given, Mapping) or _depth(given, path):
        return problem
    named = (name for name in given if re.search(rf"\b{name}\b", problem.why))
    name = next(named, None)
    if name is None:
        return problem
    wide = f"model.{slot}.{key_text(path)}" + ("" if problem.value is MISSING else f" = {show(problem.value)}")
    return replace(
        problem,
        key=key_text(("model", "layers", index, slot, name)),
        value=MISSING if isinstance(given[name], (Mapping, list)) else given[name],
        why=f"{wide}: {problem.why}",
        allowed=f"another {name}, or for model.{slot}.{key_text(path)}: {problem.allowed}",
    )


def layer_notices(model: Transformer.Config, job: Job, world_size: int | None) -> Iterator[str]:
    """The warning lines of the tables of single layers that the model-wide ones do not have."""
    for slot, index, table in _tables(model):
        wide = set(notices_below(getattr(model, slot), ("model", slot), job, world_size))
        for line in notices_below(table, ("model", "layers", index, slot), job, world_size):
            if line.replace(f"model.layers[{index}].{slot}", f"model.{slot}", 1) not in wide:
                yield line


def _tables(model: Transformer.Config) -> Iterator[tuple[str, int, SlotConfig]]:
    """(slot, entry, choice) of every choice that is not the model-wide one."""
    for variant in variants(model):
        for slot, index in variant.entries.items():
            yield slot, index, getattr(variant.layer, slot)


def resolved_layers(model: Transformer.Config, mode: str, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Entries of model.layers with whole tables, each for layers of its own: equal for models that are equal.

    `without` names keys that do not count, at any depth.
    """

    def dump(config: SlotConfig) -> dict[str, Any]:
        return tables_without(config.model_dump(mode=mode), without)

    wide = {slot: dump(getattr(model, slot)) for slot in SLOTS}
    groups: list[tuple[list[int], dict[str, Any]]] = []
    for variant in variants(model):
        own = {slot: table for slot in variant.entries if (table := dump(getattr(variant.layer, slot))) != wide[slot]}
        numbers = next((numbers for numbers, tables in groups if tables == own), None)
        if numbers is None:
            groups.append((list(variant.numbers), own))
        else:
            numbers.extend(variant.numbers)
    return [{"at": ",".join(map(str, sorted(numbers))), **own} for numbers, own in groups if own]


def tables_without(value: Any, keys: tuple[str, ...]) -> Any:
    """Tables without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: tables_without(inner, keys) for key, inner in value.items() if key not in keys}
    return [tables_without(item, keys) for item in value] if isinstance(value, list) else value
