"""Gates on the output of the heads."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.linear import Linear
from titan_lite.models.module import Module


class Gate(Module):
    """(heads' output (B, H, T, Dv), the attention's input (B, T, D)) -> (B, H, T, Dv)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "gate"
        default_type: ClassVar[str | None] = "none"


class NoGate(Gate):
    """The heads' output."""

    class Config(Gate.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int, n_heads: int, value_dim: int, linear: Linear.Config):
        super().__init__()

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y
