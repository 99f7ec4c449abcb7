"""Model families: `presets/<name>.toml` holds common [model] tables and, over them, [flavors.<flavor>] tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import titan_lite
from titan_lite.config.errors import UNKNOWN_PRESET, ConfigError, Problem
from titan_lite.config.merge import Layer, merged
from titan_lite.config.reader import read_file
from titan_lite.config.schema import Table, nearest

FOLDER = FilePath(titan_lite.__file__).parent / "presets"
DEFAULT_FLAVOR = "debugmodel"


def preset_names() -> list[str]:
    """The families there are."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def flavors(name: str) -> list[str]:
    """The sizes of a family."""
    return list(read_file(FOLDER / f"{name}.toml").tables["flavors"])


def preset(name: str, flavor: str, root: Table) -> Layer:
    """The layer of a family's size; without a flavor, of its debug model. ConfigError for a name that is none."""
    if name not in preset_names():
        near = nearest(name, preset_names())
        raise ConfigError.at(
            "model.name", "no preset has this name", name, ", ".join(preset_names()), near, code=UNKNOWN_PRESET
        )
    layer = read_file(FOLDER / f"{name}.toml")
    sizes: Mapping[str, Any] = layer.tables["flavors"]
    chosen = flavor or DEFAULT_FLAVOR
    if chosen not in sizes:
        why = f"the preset {name} has no such flavor" if flavor else f"the preset {name} needs a flavor"
        near = nearest(flavor, sizes)
        raise ConfigError([Problem(UNKNOWN_PRESET, "model.flavor", why, flavor, ", ".join(sizes), near)])
    below = ("flavors", chosen)
    common = Layer(
        {"model": layer.tables["model"]}, {path: place for path, place in layer.origins.items() if path[0] == "model"}
    )
    size = Layer(
        {"model": {**sizes[chosen], "flavor": chosen}},
        {("model", *path[2:]): place for path, place in layer.origins.items() if path[:2] == below},
    )
    return merged([common, size], root)
