"""Sliding windows in Hugging Face's configs, in all layers or in some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from titan_lite.hf.normal_form import Tables
from titan_lite.hf.setting import View, nested

CAUSAL: Final = {"type": "causal"}
LOCAL: Final = "sliding_attention"
GLOBAL: Final = "full_attention"


def window(attention: Mapping[str, Any]) -> int | None:
    """How many tokens the queries of a layer see, itself included; None where there is no window."""
    found = [mask["window"] for mask in attention.get("masks", ()) if mask["type"] == "sliding_window"]
    return found[0] if found else None


def masks(width: int | None) -> list[Tables]:
    """Our masks of a layer with this window."""
    return [CAUSAL] if width is None else [CAUSAL, {"type": "sliding_window", "window": width}]


def numbers(layers: list[int]) -> str:
    """Layers as `at` of an entry of model.layers wants them."""
    return ",".join(map(str, layers))


@dataclass(frozen=True)
class EveryLayer:
    """`sliding_window`: the same window in all layers, or None."""

    def to_hf(self, model: View) -> Tables:
        return {"sliding_window": window(model.layers[0]["attention"])}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        return nested("attention.masks", masks(settings.get("sliding_window")))


@dataclass(frozen=True)
class ByLayer:
    """`layer_types` and `sliding_window`: one window, in some layers."""

    switch: bool = False
    """Whether there is a `use_sliding_window` beside it (Qwen)."""

    def to_hf(self, model: View) -> Tables:
        widths = [window(layer["attention"]) for layer in model.layers]
        width = next((width for width in widths if width), None)
        types = [GLOBAL if width is None else LOCAL for width in widths]
        return {"sliding_window": width, "layer_types": types} | (
            {"use_sliding_window": width is not None} if self.switch else {}
        )

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        local = local_layers(settings)
        everywhere = nested("attention.masks", masks(None))
        if not local:
            return everywhere
        there = {"at": numbers(local), "attention": {"masks": masks(settings["sliding_window"])}}
        return everywhere | {"layers": [there]}


def local_layers(settings: Mapping[str, Any]) -> list[int]:
    """The layers with a window."""
    types = settings.get("layer_types") or []
    return [i for i, kind in enumerate(types) if kind == LOCAL]
