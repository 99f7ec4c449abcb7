"""Feed-forward networks without a gate."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from titan_lite.config.fields import PositiveInt
from titan_lite.models.activation import Activation, activation
from titan_lite.models.context import Context
from titan_lite.models.ffn.base import DenseFFN
from titan_lite.models.linear import Linear


class MLP(DenseFFN):
    """down(act(up(x))): relu as in the original transformer, gelu in GPT-2, relu_squared in Primer and Nemotron.

    Source: arXiv 1706.03762, section 3.3.
    """

    class Config(DenseFFN.Config):
        type: Literal["mlp"] = "mlp"
        hidden: PositiveInt = 1024
        """Inner width F."""
        activation: Activation = "gelu"
        """Between the two matrices."""
        bias: bool = False
        """Biases on both matrices."""

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.up = linear.build(dim, config.hidden, bias=config.bias)
        self.down = linear.build(config.hidden, dim, start="residual", bias=config.bias)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down(self.activation(self.up(x)))
