"""nGPT's feed-forward network."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from titan_lite.config.fields import PositiveInt
from titan_lite.models.context import Context
from titan_lite.models.ffn.base import DenseFFN
from titan_lite.models.learned_scale import LearnedScale
from titan_lite.models.linear import Linear


class ScaledGLU(DenseFFN):
    """down(silu(s_v * sqrt(D) * gate(x)) * s_u * up(x)) with learned s_u and s_v (F,) that start at 1.

    The factor sqrt(D) brings unit vectors' products back to the range in which silu is not linear.
    Source: arXiv 2410.01131, section 2.4.
    """

    class Config(DenseFFN.Config):
        type: Literal["glu_scaled"] = "glu_scaled"
        hidden: PositiveInt = 768
        """Inner width F."""

    def __init__(self, config: Config, dim: int, linear: Linear.Config):
        super().__init__()
        self.root = dim**0.5
        self.gate = linear.build(dim, config.hidden)
        self.up = linear.build(dim, config.hidden)
        self.down = linear.build(config.hidden, dim, start="residual")
        self.s_u = LearnedScale(config.hidden, init=1.0, scale=1.0)
        self.s_v = LearnedScale(config.hidden, init=1.0, scale=1.0)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate = self.gate(x) * (self.s_v() * self.root).type_as(x)
        return self.down(F.silu(gate) * (self.up(x) * self.s_u().type_as(x)))
