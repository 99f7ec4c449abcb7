"""Gates on the output of the heads."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.linear import Linear
from titan_lite.models.module import Module
from titan_lite.parallel.plan import Plan, heads


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


class SigmoidGate(Gate):
    """y * sigmoid(x W_g)."""

    def __init__(self, n_heads: int, width: int, dim: int, linear: Linear.Config):
        super().__init__()
        self.n_heads, self.width = n_heads, width
        self.linear = linear.build(dim, n_heads * width)

    def tp_plan(self) -> Plan:
        return {"linear": heads(self.n_heads)}

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        gate = self.linear(x).unflatten(-1, (-1, self.width)).transpose(1, 2)  # (B, H, T, width)
        return y * gate.sigmoid()


class HeadGate(SigmoidGate):
    """y * sigmoid(x W_g) with one gate per head, W_g: D -> H. Source: arXiv 2505.06708."""

    class Config(Gate.Config):
        type: Literal["head"] = "head"

    def __init__(self, config: Config, dim: int, n_heads: int, value_dim: int, linear: Linear.Config):
        super().__init__(n_heads, 1, dim, linear)


class ElementGate(SigmoidGate):
    """y * sigmoid(x W_g) with one gate per element, W_g: D -> H Dv (Qwen3-Next). Source: arXiv 2505.06708."""

    class Config(Gate.Config):
        type: Literal["element"] = "element"

    def __init__(self, config: Config, dim: int, n_heads: int, value_dim: int, linear: Linear.Config):
        super().__init__(n_heads, value_dim, dim, linear)
