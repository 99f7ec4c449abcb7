"""What a model computes, as tables that can be compared: sizes written out, training's own settings left out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from titan_lite.models.attention import MLA, GroupedAttention, HeadAttention
from titan_lite.models.block import Layer
from titan_lite.models.residual import ConstantScale
from titan_lite.models.transformer import Transformer

Tables: TypeAlias = dict[str, Any]
Path: TypeAlias = tuple[str | int, ...]


def normal_form(model: Transformer.Config) -> Tables:
    """Model-wide tables, and under "layers" those of each executed layer."""
    embedding = _without(model.embedding.model_dump(), "dropout", "warm_start")
    if embedding.get("scale") == "sqrt_dim":
        embedding["scale"] = model.dim**0.5
    return {
        "dim": model.dim,
        "n_layers": model.n_layers,
        "embedding": embedding,
        "stack": model.stack.model_dump(),
        "layers": [_layer(layer, model.dim) for layer in model.each_layer()],
        "final_norm": model.last_norm().model_dump(),
        "head": _without(model.head.model_dump(), "reward"),  # beside what the logits are
        "mtp": _without(model.mtp.model_dump(), "weight"),
    }


def _layer(layer: Layer, dim: int) -> Tables:
    return {
        "block": layer.block.model_dump(),
        "attention": _attention(layer.attention, dim),
        "ffn": _ffn(layer.ffn.model_dump()),
        "residual": _residual(layer),
        "norm": layer.norm.model_dump(),
        "linear": layer.linear.model_dump(),
    }


def _residual(layer: Layer) -> Tables:
    tables = _without(layer.residual.model_dump(), "dropout")
    if isinstance(layer.residual.scale, ConstantScale.Config):
        tables["scale"]["value"] = layer.residual.scale.factor(layer.n_layers)
    return tables


def _attention(config: Any, dim: int) -> Tables:
    tables = _without(config.model_dump(), "kernel", "dropout")
    if tables["type"] == "gqa_fused":
        tables["type"] = "gqa"  # the same sums, from one matrix
    if isinstance(config, GroupedAttention.Config):
        tables |= {"n_kv_heads": config.n_kv_heads or config.n_heads, "head_dim": config.width(dim)}
    elif isinstance(config, MLA.Config):
        tables["head_dim"] = config.own_width(dim)
    if not isinstance(config, HeadAttention.Config):
        return tables
    return tables | {
        "value_dim": config.value_width(dim),
        "scale": config.score_scale(config.width(dim)),
        "bias": sorted(tables["bias"]),
        "masks": sorted((mask for mask in tables["masks"] if mask["type"] != "document"), key=str),
    }


def _ffn(tables: Tables) -> Tables:
    tables = _without(tables, "balance")
    if "offset" in tables:
        tables["offset"] = _without(tables["offset"], "rate")
    return tables


def _without(tables: Tables, *keys: str) -> Tables:
    return {key: value for key, value in tables.items() if key not in keys}


def absorbed(ours: Tables, theirs: Tables) -> Tables:
    """Our normal form with theirs in the places where a difference disappears in the exported weights.

    These are: biases, offsets and gains that only the target has (zeros and ones), the layout and the direction of
    rotations (an order of the rows that make queries and keys) and the factor of the scores (a factor of those that
    make queries).
    """
    ours = copy.deepcopy(ours)
    _absorb_norm(ours["final_norm"], theirs["final_norm"])
    for mine, other in zip(ours["layers"], theirs["layers"], strict=False):
        _absorb_norm(mine["norm"], other["norm"])
        if mine["ffn"].get("bias") is False and other["ffn"].get("bias"):
            mine["ffn"]["bias"] = True
        if mine["ffn"].get("offset") == {"type": "none"} and "offset" in other["ffn"]:
            mine["ffn"]["offset"] = other["ffn"]["offset"]
        a, b = mine["attention"], other["attention"]
        if a["type"] != b["type"]:
            continue
        if set(a["bias"]) <= set(b["bias"]):
            a["bias"] = b["bias"]
        if "latent_norm" in a:
            _absorb_norm(a["latent_norm"], b["latent_norm"])
        if a.get("qk_norm", {"type": "none"})["type"] == "none":
            a["scale"] = b["scale"]
        if a["position"]["type"] == b["position"]["type"] == "rope":
            a["position"] |= {key: b["position"][key] for key in ("layout", "direction")}
    return ours


def _absorb_norm(ours: Tables, theirs: Tables) -> None:
    if ours["type"] == theirs["type"]:
        if ours.get("gain") == "none":
            ours["gain"] = theirs["gain"]
        if ours.get("bias") is False:
            ours["bias"] = theirs["bias"]


def differences(ours: Any, theirs: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any]]:
    """(path, our value, their value) of what differs; of a slot with another type, only the type."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if ours.get("type") != theirs.get("type"):
            yield (*path, "type"), ours.get("type"), theirs.get("type")
            return
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from differences(ours.get(key), theirs.get(key), (*path, key))
    elif path == ("layers",):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):  # n_layers is compared as well
            yield from differences(mine, other, (*path, index))
    elif not equal(ours, theirs):
        yield path, ours, theirs


def equal(a: Any, b: Any) -> bool:
    """Equality, up to rounding for numbers."""
    if isinstance(a, float) or isinstance(b, float):
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
        return numbers and math.isclose(a, b, rel_tol=1e-12)
    return bool(a == b)
