"""Gated feed-forward networks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from titan_lite.config.fields import PositiveFloat, PositiveInt
from titan_lite.models.activation import Activation, activation
from titan_lite.models.context import Context
from titan_lite.models.ffn.base import DenseFFN
from titan_lite.models.linear import Linear


class Gated(DenseFFN):
    """The three matrices of a gated network. A subclass says what becomes of gate(x) and up(x) before down."""

    class Config(DenseFFN.Config):
        hidden: PositiveInt = 768
        """Inner width F."""
        bias: bool = False
        """Biases on all three matrices."""

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.gate = linear.build(dim, config.hidden, bias=config.bias)
        self.up = linear.build(dim, config.hidden, bias=config.bias)
        self.down = linear.build(config.hidden, dim, start="residual", bias=config.bias)


class GLU(Gated):
    """down(act(gate(x)) * up(x)); sigmoid GLU, identity Bilinear, relu ReGLU, gelu GEGLU, silu SwiGLU.

    Source: arXiv 2002.05202.
    """

    class Config(Gated.Config):
        type: Literal["glu"] = "glu"
        activation: Activation = "silu"
        """Applied to the gate."""

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__(config, dim, linear)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class ClampedSwiGLU(Gated):
    """down((u + 1) * g * sigmoid(alpha * g)), g = min(gate(x), limit), u = up(x) clamped to [-limit, limit].

    Source: arXiv 2508.10925 (gpt-oss).
    """

    class Config(Gated.Config):
        type: Literal["clamped_swiglu"] = "clamped_swiglu"
        limit: PositiveFloat = 7.0
        """Bound of what is multiplied."""
        alpha: PositiveFloat = 1.702
        """Steepness of the sigmoid; 1.702 makes it close to GELU."""

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__(config, dim, linear)
        self.limit, self.alpha = config.limit, config.alpha

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate = self.gate(x).clamp(max=self.limit)
        up = self.up(x).clamp(-self.limit, self.limit)
        return self.down((up + 1) * (gate * torch.sigmoid(self.alpha * gate)))
