"""Gated feed-forward networks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from titan_lite.config.fields import PositiveInt
from titan_lite.models.activation import Activation, activation
from titan_lite.models.context import Context
from titan_lite.models.ffn.base import FFN
from titan_lite.models.linear import Linear


class GLU(FFN):
    """down(act(gate(x)) * up(x)); with silu this is SwiGLU. Source: arXiv 2002.05202."""

    class Config(FFN.Config):
        type: Literal["glu"] = "glu"
        hidden: PositiveInt = 768
        """Inner width F."""
        activation: Activation = "silu"
        """Applied to the gate."""

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.gate = linear.build(dim, config.hidden)
        self.up = linear.build(dim, config.hidden)
        self.down = linear.build(config.hidden, dim, start="residual")
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))
