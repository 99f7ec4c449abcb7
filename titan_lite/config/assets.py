"""`model.hf_assets_path`: the folder of a published model, a shorthand for the [tokenizer] table of its files."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Final

from titan_lite.config.errors import CROSS_FIELD, FILE_MISSING, Problem, show
from titan_lite.config.merge import Layer
from titan_lite.config.paths import Path, forget, nearest_origin

_KEY: Final[Path] = ("model", "hf_assets_path")
_FILES: Final = ("tokenizer.json", "original/tokenizer.model", "tokenizer.model")


def expand_assets(layer: Layer, below: Layer) -> tuple[list[Problem], list[str]]:
    """Writes the layer's model.hf_assets_path into its [tokenizer]; `below` is all that it overrides.

    It takes nothing over from the tokenizer of below. A layer with another tokenizer than the hf_assets_path of below
    makes that void, with a warning line.
    """
    model = layer.tables.get("model", {})
    given = _tokenizer(layer)
    if not isinstance(model, Mapping) or given is None:
        return [], []
    if "hf_assets_path" not in model:
        return [], _void(layer, given, below)
    assets = model["hf_assets_path"]
    if not isinstance(assets, str) or not (assets or _assets(below)):
        return [], []
    below.tables.pop("tokenizer", None)
    forget(below.origins, ("tokenizer",))
    if not assets:
        return [], []
    table, _ = tokenizer_table(assets)
    if not _agree(given, assets, table):
        return [_contradiction(layer, given, assets, table)], []
    layer.tables["tokenizer"] = {**table, **given}
    origin = nearest_origin(layer.origins, _KEY)
    if origin is not None:
        for key in table:
            layer.origins.setdefault(("tokenizer", key), origin)
    return [], []


def missing_assets(top: Layer) -> Problem | None:
    """What is wrong with the folder that chose the tokenizer of all layers together."""
    assets, tokenizer = _assets(top), _tokenizer(top)
    if not assets or tokenizer is None:
        return None
    table, problem = tokenizer_table(assets)
    return problem if tokenizer.get("path") == table["path"] else None


def _assets(layer: Layer) -> str:
    model = layer.tables.get("model", {})
    assets = model.get("hf_assets_path", "") if isinstance(model, Mapping) else ""
    return assets if isinstance(assets, str) else ""


def _tokenizer(layer: Layer) -> dict[str, Any] | None:
    """The layer's own [tokenizer]; None where something else than a table or a type stands there."""
    given = layer.tables.get("tokenizer", {})
    if isinstance(given, str):
        return {"type": given}
    return dict(given) if isinstance(given, Mapping) else None


def _agree(given: Mapping[str, Any], assets: str, table: Mapping[str, Any]) -> bool:
    """Whether [tokenizer] only says more exactly what hf_assets_path, which stands for `table`, says too."""
    path = given.get("path")
    if isinstance(path, str):
        return FilePath(os.path.expanduser(path)).is_relative_to(os.path.expanduser(assets))
    return bool(given.get("type", table["type"]) == table["type"])


def _void(layer: Layer, given: Mapping[str, Any], below: Layer) -> list[str]:
    """A tokenizer of the layer's own wins over the hf_assets_path of the layers below."""
    assets = _assets(below)
    if not given or not assets or _agree(given, assets, _tokenizer(below) or {"type": None}):
        return []
    layer.tables.setdefault("model", {})["hf_assets_path"] = ""
    origin = nearest_origin(layer.origins, ("tokenizer",))
    place = f" ({origin.file}:{origin.line})" if origin and origin.line else f" ({origin.file})" if origin else ""
    return [f"model.hf_assets_path = {show(assets)} is not used: [tokenizer]{place} comes later and wins"]


def _contradiction(layer: Layer, given: Mapping[str, Any], assets: str, table: Mapping[str, Any]) -> Problem:
    key = "path" if isinstance(given.get("path"), str) else "type"
    origin = nearest_origin(layer.origins, _KEY)
    return Problem(
        CROSS_FIELD,
        "model.hf_assets_path",
        f"and tokenizer.{key} = {show(given[key])} say different things: "
        f"the first means tokenizer.{key} = {show(table[key])}",
        assets,
        "one of the two in one file (in a file with a `base`, either replaces the other of the base)",
        file=origin.file if origin else "",
        line=origin.line if origin else 0,
    )


def tokenizer_table(assets_path: str) -> tuple[dict[str, Any], Problem | None]:
    """The [tokenizer] table of a folder (or of one tokenizer file), and what is wrong with it.

    Where the folder is missing the table is still given, because estimating a model's cost needs no tokenizer files.
    """
    folder = FilePath(os.path.expanduser(assets_path))
    names = ("", *_FILES) if os.path.isfile(folder) else _FILES
    why = "the folder holds no tokenizer" if os.path.isdir(folder) else "there is no such folder"
    for name in names:
        if os.path.isfile(folder / name):
            try:
                return {"type": _type_of(folder / name), "path": str(FilePath(assets_path) / name)}, None
            except OSError as error:
                why = f"{folder / name} cannot be read: {error.strerror}"
                break
    allowed = f"a folder with {', '.join(_FILES[:-1])} or {_FILES[-1]}, or the path of such a file"
    problem = Problem(FILE_MISSING, "model.hf_assets_path", why, assets_path, allowed)
    return {"type": "huggingface", "path": assets_path}, problem


def _type_of(file: FilePath) -> str:
    """A .json file is the tokenizers library's, a .model file tiktoken's (lines of base64, rank) or SentencePiece's."""
    if file.suffix == ".json":
        return "huggingface"
    with file.open("rb") as stream:
        first = stream.readline(4096).split()
    try:
        base64.b64decode(first[0], validate=True)
        int(first[1])
    except (IndexError, ValueError):
        return "sentencepiece"
    return "tiktoken" if len(first) == 2 else "sentencepiece"
