"""A squashing function in the place of a norm."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from titan_lite.config.fields import PositiveFloat
from titan_lite.models.norm.base import Norm
from titan_lite.models.spec import Spec


class DyT(Norm):
    """Dynamic tanh: y = g * tanh(a * x) + b with a learned scalar a, and g and b per channel.

    Source: arXiv 2503.10622.
    """

    class Config(Norm.Config):
        type: Literal["dyt"] = "dyt"
        alpha: PositiveFloat = 0.5
        """First value of a."""

    def __init__(self, config: Config, dim: int):
        super().__init__()
        self.dim, self.start = dim, config.alpha
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x) + self.bias

    def param_specs(self) -> dict[str, Spec]:
        return {
            "alpha": Spec("scalar", 1, 1, self.start),
            "weight": Spec("norm", 1, self.dim, 1.0),
            "bias": Spec("bias", 1, self.dim, 0.0),
        }
