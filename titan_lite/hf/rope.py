"""Rotary positions in Hugging Face's configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from titan_lite.hf.normal_form import Tables
from titan_lite.hf.setting import View, nested
from titan_lite.models.position import RoPE

SCALINGS: Final = {
    "none": ("default", {}),
    "linear": ("linear", {"factor": "factor"}),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_len": "original_max_position_embeddings",
        },
    ),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            "original_max_len": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
        },
    ),
}
"""Our types of scaling: their name, and their names of our keys. Their "dynamic" is left out: it has no length of its
own and takes the config's longest text, which an export sets for other reasons."""
_OURS: Final = {theirs: ours for ours, (theirs, _) in SCALINGS.items()}


def rope_parameters(position: Mapping[str, Any]) -> Tables:
    """Their `rope_parameters` of our position's table: the plain ones where they do not have what it says."""
    scaling = position.get("scaling", {"type": "none"})
    name, keys = SCALINGS.get(scaling["type"], SCALINGS["none"])
    given = {theirs: scaling[ours] for ours, theirs in keys.items() if scaling[ours]}
    if scaling.get("truncate") is False:
        given["truncate"] = False
    return {"rope_type": name, "rope_theta": position.get("theta", 10000.0), **given}


def position(parameters: Mapping[str, Any]) -> Tables:
    """Our position's table of their `rope_parameters`."""
    ours = _OURS.get(parameters.get("rope_type", "default"), "none")
    keys = SCALINGS[ours][1]
    given = {key: parameters[theirs] for key, theirs in keys.items() if parameters.get(theirs)}
    whole = {key: int(value) if key == "original_max_len" else float(value) for key, value in given.items()}
    if ours == "yarn":
        whole["truncate"] = parameters.get("truncate", True)
    return {"type": "rope", "theta": float(parameters["rope_theta"]), "scaling": {"type": ours, **whole}}


@dataclass(frozen=True)
class Rope:
    """model.attention.position, the same in all layers."""

    partial: bool = False
    """Whether the architecture can rotate a part of each head; others do not look at the key for it."""

    def to_hf(self, model: View) -> Tables:
        table = model.get("attention.position") or {}
        part = {"partial_rotary_factor": table.get("fraction", 1.0)} if self.partial else {}
        return {"rope_parameters": rope_parameters(table) | part}

    def from_hf(self, settings: Mapping[str, Any]) -> Tables:
        parameters = settings["rope_parameters"]
        part = {"fraction": float(parameters["partial_rotary_factor"])} if self.partial else {}
        return nested("attention.position", position(parameters) | part)


def row_order(config: Any, head_dim: int) -> Tensor:
    """The order of a head's rows in which its rotation is the usual one: half-split pairs, counted forwards.

    Counting backwards turns each pair the other way round, which is what a swap of the two halves does.
    """
    order = torch.arange(head_dim)
    if not isinstance(config, RoPE.Config):
        return order
    width = config.width(head_dim)
    turned = order[:width]
    if config.layout == "interleaved":
        turned = torch.cat((turned[0::2], turned[1::2]))
    if config.direction == "reversed":
        turned = turned.roll(width // 2)
    return torch.cat((turned, order[width:]))
