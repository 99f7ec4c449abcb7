"""What a model can be made of, read from the registry: one factor a slot and one a key with few values.

A new component, a new slot and a new key with named values are factors or levels the day they are added. By hand stand
only sizes that suit a tiny model, the keys that must be given together, and keys whose values are numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch
from pydantic.fields import FieldInfo
from safetensors.torch import save_file

from titan_lite.config.component import SlotConfig
from titan_lite.config.features import Place, choices, example_table, places
from titan_lite.config.fields import Probability
from titan_lite.config.paths import Path, key_text
from titan_lite.config.schema import bare, is_list, item_of, literals, members, range_of
from titan_lite.models.transformer import Transformer

VOCAB = 256
"""The tokenizer is bytes."""
WARM = "warm.safetensors"
BASE: dict[str, Any] = {
    "model": {"dim": 32, "n_layers": 2, "attention": {"n_heads": 4}},
    "training": {
        "local_batch_size": 4,
        "seq_len": 16,
        "steps": 10,
        "mixed_precision_param": "float32",
        "loss_chunk_tokens": 8,
    },
    "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
    "lr_scheduler": {"warmup_steps": 0},
    "tokenizer": {"type": "bytes"},
    "activation_checkpoint": {"mode": "none"},
}

SIZES: dict[str, Any] = {
    "hidden": 24,
    "width": 16,
    "window": 5,
    "length": 3,
    "max_len": 16,
    "original_max_len": 12,
    "factor": 2.0,
    "value": 0.5,
    "cap": 5.0,
    "schedule": [0, 0],
    "kv_rank": 16,
    "rope_dim": 8,
}
"""Values for keys that must be given, and for widths, in a tiny model."""

COMPANIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("model.embedding.position.trainable", "True"): {"max_len": 16},
    ("model.residual.change", "linear"): {"start": "closed_form"},
    ("model.residual.change", "none"): {"start": "closed_form"},
}
"""Keys of the same table without which a value has no effect."""

TABLES: dict[tuple[str, str], dict[str, Any]] = {
    ("memory", "long_term"): {"type": "long_term", "length": 4, "segment": 2, "segments": 8, "retrieve": 3},
    ("stack", "recurrent"): {"type": "recurrent", "prelude": 1, "coda": 0, "mean_iterations": 2},
    ("init", "zeros"): {"type": "normal", "rules": [{"role": "hidden", "match": "*.q*", "init": "zeros"}]},
}
"""(slot, choice): the table to make it with, where it is no choice for a whole model."""

BY_HAND: dict[str, list[Any]] = {
    "model.attention.position.fraction": [1.0, 0.5],
    "model.attention.n_kv_heads": [0, 2, 1],
    "model.attention.value_dim": [0, 4],
    "model.param_dtype": [{}, {"hidden": "bfloat16"}],
    "model.attention.q_rank": [0, 12],
    "model.layers": [[], [{"at": -1, "attention": {"masks": ["causal"], "position": "none"}}]],
}
"""Numbers, lists and tables worth two levels; the first is the default."""


class Level(NamedTuple):
    """One value of a factor; None = the key is left out."""

    name: str
    value: Any
    needs: frozenset[str]
    """The levels of the factor around it that have the key and take the value."""


class Factor(NamedTuple):
    key: str
    path: Path
    around: str
    """Key of the slot whose table holds this one; "" for the model's own, which are always there."""
    levels: tuple[Level, ...]
    """The first is the default."""
    having: frozenset[str]
    """The levels of the factor around it that have the key at all."""

    def level(self, name: str) -> Level:
        return next(level for level in self.levels if level.name == name)


ABSENT = "absent"
"""Stands for a level where the choice around the factor has no such key."""
Row = Mapping[str, str]
"""{factor: level}."""


def factors() -> dict[str, Factor]:
    """All factors by key, a slot before what stands in its table."""
    slots = {place.path: place for place in places(Transformer.Config, ("model",))}
    out: list[Factor] = []
    for path, place in slots.items():
        around, fields = _around(path, slots)
        default = next(iter(fields.values())).default
        names = frozenset(fields)
        levels = [Level(name, table, names) for name, table in _tables(place.family, place.others)]
        if default is None:
            levels.append(Level("unset", None, names))
        first = "unset" if default is None else getattr(default, "type", levels[0].name)
        levels.sort(key=lambda level: level.name != first)
        out.append(Factor(key_text(path), path, around, tuple(levels), names))
    for path, place in slots.items():
        out += _options(path, place.family)
    for key, values in BY_HAND.items():
        path = tuple(key.split("."))
        around, fields = _around(path, slots)
        names = frozenset(fields)
        levels = [Level(str(value), value, names) for value in values]
        out.append(Factor(key, path, around, tuple(levels), names))
    return {factor.key: factor for factor in out}


def _around(path: Path, slots: Mapping[Path, Place]) -> tuple[str, dict[str, FieldInfo]]:
    """The key of the slot around `path`, and its choices that have the key, with the key's field."""
    outer: Path = max((p for p in slots if p != path and path[: len(p)] == p), key=len, default=())
    if not outer:
        return "", {"": Transformer.Config.model_fields[str(path[1])]}
    found = choices(slots[outer].family)
    name = str(path[len(outer)])
    return key_text(outer), {type_: choice.model_fields[name] for type_, choice in found if name in choice.model_fields}


def _tables(family: type[SlotConfig], others: tuple[Any, ...] | None) -> Iterator[tuple[str, Any]]:
    """(name, value) of each choice; of a list of choices the default, it and each other one, and all."""
    tables = {name: _tiny(choice) for name, choice in choices(family)}
    if others is None:
        yield from tables.items()
        return
    first = [other.type for other in others]
    added = [name for name in tables if name not in first]
    for names in ([], *([name] for name in added), added):
        yield "+".join((*first, *names)), [tables[name] for name in (*first, *names)]


def _tiny(choice: type[SlotConfig]) -> dict[str, Any]:
    table = example_table(choice)
    fields = choice.model_fields
    if (choice.slot, table["type"]) in TABLES:
        return TABLES[choice.slot, table["type"]]
    return table | {key: value for key, value in SIZES.items() if key in fields and (key in table or key == "hidden")}


def _options(path: Path, family: type[SlotConfig]) -> Iterator[Factor]:
    """A factor for each key of the slot's choices that takes few values."""
    values: dict[str, dict[str, Level]] = {}
    for choice_name, choice in choices(family):
        for key, field in choice.model_fields.items():
            for value in _values(field) if key != "type" else ():
                levels = values.setdefault(key, {})
                known = levels.get(str(value), Level(str(value), value, frozenset()))
                levels[str(value)] = known._replace(needs=known.needs | {choice_name})
    for key, others in values.items():
        place = (*path, key)
        having = frozenset(name for name, choice in choices(family) if key in choice.model_fields)
        levels = {"default": Level("default", None, having), **others}
        yield Factor(key_text(place), place, key_text(path), tuple(levels.values()), having)


def _values(field: FieldInfo) -> list[Any]:
    """The values, besides the default, of a key that has only a few; for a probability, one."""
    annotation = field.annotation
    if is_list(annotation):
        every = list(literals(item_of(annotation)))
        return [every] * (bool(every) and list(field.default) != every)
    if bare(annotation) is bool:
        return [not field.default] if isinstance(field.default, bool) else []
    named = [value for member in members(bare(annotation)) for value in literals(member)]
    named = named or list(literals(annotation))
    if not named and bare(annotation) is float and _is_probability(field):
        named = [0.1]
    return [value for value in named if value != field.default]


def _is_probability(field: FieldInfo) -> bool:
    return range_of(field) == range_of(FieldInfo.from_annotation(Probability))


def tables_of(row: Row, all_factors: Mapping[str, Factor], folder: FilePath) -> dict[str, Any]:
    """The tables of a job with these levels. `folder` has the files of `write_files`."""
    tables = copy.deepcopy(BASE)
    for factor in all_factors.values():
        if row[factor.key] == ABSENT or (level := factor.level(row[factor.key])).value is None:
            continue
        table: Any = tables
        for part in factor.path[:-1]:
            table = table.setdefault(part, {})
        name = factor.path[-1]
        table[name] = {**table.get(name, {}), **level.value} if isinstance(level.value, dict) else level.value
        table.update(COMPANIONS.get((factor.key, level.name), {}))
    embedding = tables["model"]["embedding"]
    if row["model.embedding.warm_start"] == "file":
        embedding["warm_start"] |= {"path": str(folder / WARM), "tensor": embedding["type"]}
    return tables


def plain_row(settings: Mapping[str, str], all_factors: Mapping[str, Factor]) -> dict[str, str]:
    """The row of a model with these levels that says nothing else, but for the slots that they need around them."""
    wanted = dict(settings)
    for key in settings:
        factor = all_factors[key]
        while factor.around:
            needs = factor.level(wanted[factor.key]).needs
            default = all_factors[factor.around].levels[0].name
            wanted.setdefault(factor.around, default if default in needs else min(needs))
            factor = all_factors[factor.around]
    row: dict[str, str] = {}
    for key, factor in all_factors.items():
        there = not factor.around or row[factor.around] in factor.having
        row[key] = wanted.get(key, factor.levels[0].name) if there else ABSENT
    return row


def write_files(folder: FilePath, dim: int = BASE["model"]["dim"]) -> None:
    """What levels read: an embedding to start from, of each width, for models of width `dim`."""
    widths = {"token": dim, "low_rank": SIZES["width"]}
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: 0.1 * torch.randn(VOCAB, width, generator=generator) for name, width in widths.items()}, folder / WARM
    )
