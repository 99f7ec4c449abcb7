"""`training.dataset` and `validation.dataset`: names and paths that stand for a [data.source] table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Final

from titan_lite.config.errors import CROSS_FIELD, NOT_ALLOWED, Problem
from titan_lite.config.merge import Layer
from titan_lite.config.paths import Origin, forget
from titan_lite.config.schema import nearest

_C4: Final = {"type": "huggingface", "path": "allenai/c4", "name": "en", "text_key": "text"}
NAMED: Final[dict[str, dict[str, Any]]] = {
    "python_stdlib": {"type": "python_stdlib"},
    "c4": {**_C4, "split": "train"},
    "c4_validation": {**_C4, "split": "validation"},
    "c4_test": {"type": "python_stdlib"},
}
"""Names and the source they stand for."""

_FILE = re.compile(r"\.(txt|jsonl|jsonl\.gz|jsonl\.zst|parquet)$")
_ALLOWED: Final = (
    ", ".join(f'"{name}"' for name in NAMED)
    + ', "hf:org/name", or a path or glob of .txt .jsonl .jsonl.gz .jsonl.zst .parquet files'
)


def source_table(dataset: str, dataset_path: str) -> dict[str, Any] | None:
    """The [data.source] table that the two keys, not both empty, stand for; None where the name is not known."""
    if dataset_path:
        named = NAMED.get(dataset, {})
        if named.get("type") == "huggingface" and not FilePath(dataset_path).is_file():
            return {**named, "path": dataset_path}
        return {"type": "files", "path": dataset_path}
    if dataset in NAMED:
        return dict(NAMED[dataset])
    if dataset.startswith("hf:"):
        return {"type": "huggingface", "path": dataset.removeprefix("hf:")} if len(dataset) > 3 else None
    if _FILE.search(dataset) or "*" in dataset or "/" in dataset:
        return {"type": "files", "path": dataset}
    return None


def c4_test_notice(section: str) -> str:
    """The warning line of a name that cannot mean here what it means in torchtitan."""
    return (
        f'{section}.dataset = "c4_test": torchtitan\'s test file does not come with titan_lite, its built-in source '
        f"python_stdlib stands in ({section}.dataset_path names a file of your own)"
    )


def unknown_dataset(key: str, dataset: str) -> Problem:
    """The problem of a name that `source_table` does not know."""
    return Problem(NOT_ALLOWED, key, "no dataset has this name", dataset, _ALLOWED, nearest(dataset, NAMED))


def expand_dataset(layer: Layer, below: Layer) -> tuple[list[Problem], list[str]]:
    """Writes the layer's training.dataset and dataset_path into its [data.source]; `below` is all that it overrides.

    A layer that sets only one of the two goes with the other one of below. Another dataset takes nothing over from the
    source of below. A layer that sets a source of its own, and neither of the two, makes those of below void.
    """
    training = layer.tables.get("training", {})
    lower = below.tables.get("training", {})
    data = layer.tables.get("data", {})
    if not all(isinstance(table, Mapping) for table in (training, lower, data)):
        return [], []
    own = {key: training[key] for key in ("dataset", "dataset_path") if key in training}
    if not own:
        if "source" in data:
            _void(layer, lower)
        return [], []
    names = {
        "dataset": "",
        "dataset_path": "",
        **{k: lower[k] for k in ("dataset", "dataset_path") if k in lower},
        **own,
    }
    if not all(isinstance(name, str) for name in names.values()) or not any(names.values()):
        return [], []
    key = "training." + ("dataset" if names["dataset"] and not names["dataset_path"] else "dataset_path")
    table = source_table(**names)
    if table is None:
        return [unknown_dataset("training.dataset", names["dataset"])], []
    given = _given_source(data)
    conflicts = [name for name in given if name in table and given[name] != table[name]]
    if conflicts:
        why = f"and [data.source] {conflicts[0]} say different things"
        return [Problem(CROSS_FIELD, key, why, names[key.split(".")[1]], "one of the two")], []
    if own.get("dataset", "") not in ("", lower.get("dataset", "")):
        _drop_source(below)
    layer.tables.setdefault("data", {})["source"] = {**table, **given}
    origin = next((layer.origins[("training", name)] for name in own if ("training", name) in layer.origins), None)
    _place_source(layer, table, origin)
    notice = names["dataset"] == "c4_test" and not names["dataset_path"]
    return [], [c4_test_notice("training")] if notice else []


def _given_source(data: Mapping[str, Any]) -> dict[str, Any]:
    source = data.get("source", {})
    return {"type": source} if isinstance(source, str) else dict(source) if isinstance(source, Mapping) else {}


def _void(layer: Layer, lower: Mapping[str, Any]) -> None:
    """A source of the layer's own wins over the shorthand of the layers below."""
    for key in ("dataset", "dataset_path"):
        if lower.get(key):
            layer.tables.setdefault("training", {})[key] = ""


def _drop_source(below: Layer) -> None:
    data = below.tables.get("data", {})
    if isinstance(data, dict):
        data.pop("source", None)
    forget(below.origins, ("data", "source"))


def _place_source(layer: Layer, table: Mapping[str, Any], origin: Origin | None) -> None:
    if origin is not None:
        for key in table:
            layer.origins.setdefault(("data", "source", key), origin)
