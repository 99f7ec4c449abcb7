"""Layer normalisation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.models.norm.base import GainNorm
from titan_lite.models.spec import Spec


class LayerNorm(GainNorm):
    """y = g * (x - mean(x)) / sqrt(var(x) + eps) + b, computed in float32. Source: arXiv 1607.06450."""

    class Config(GainNorm.Config):
        type: Literal["layernorm"] = "layernorm"
        bias: bool = True
        """Learned offset of each channel, which starts at 0."""

    def __init__(self, config: Config, dim: int):
        super().__init__(config, dim)
        self.bias = nn.Parameter(torch.empty(dim)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.gain(self.weight, self.dim), self.bias, self.eps)

    def param_specs(self) -> dict[str, Spec]:
        bias = {} if self.bias is None else {"bias": Spec("bias", 1, self.dim, 0.0)}
        return super().param_specs() | bias
