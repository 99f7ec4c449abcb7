"""Layers with experts beside dense ones, in Hugging Face's configs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from titan_lite.hf.normal_form import Tables
from titan_lite.hf.setting import Setting, View, merge, nested
from titan_lite.hf.windows import numbers


@dataclass(frozen=True)
class Sparse:
    """model.ffn: experts in some layers, one gated network in the others, and which layers these are."""

    experts: tuple[Setting, ...]
    """Settings of a layer with experts."""
    dense: tuple[Setting, ...]
    """Settings of a layer without."""
    which: Callable[[list[int]], Tables]
    """Their settings that say which layers are dense, given the numbers."""
    dense_layers: Callable[[Mapping[str, Any]], list[int]]
    """The numbers that their settings give."""
    fixed: Tables = field(default_factory=dict)
    """What a layer with experts always has."""

    def to_hf(self, model: View) -> Tables:
        kinds = {True: self.experts, False: self.dense}
        sparse = [layer["ffn"]["type"] == "moe" for layer in model.layers]
        settings = self.which([i for i, has_experts in enumerate(sparse) if not has_experts])
        for kind, keys in kinds.items():
            for setting in keys if kind in sparse else ():
                settings |= setting.to_hf(model.of_layer(sparse.index(kind)))
        return settings

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        tables = copy.deepcopy({"ffn": {"type": "moe", **self.fixed}})
        for setting in self.experts:
            merge(tables, setting.from_hf(settings))
        if not (dense := self.dense_layers(settings)):
            return tables
        there = nested("ffn.type", "glu")
        for setting in self.dense:
            merge(there, setting.from_hf(settings))
        return tables | {"layers": [{"at": numbers(dense), **there}]}
