"""Normalisation over the model width."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_lite.config.component import SlotConfig
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.module import Module
from titan_lite.models.spec import Spec


class Norm(Module):
    """(..., D) -> (..., D)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "norm"
        default_type: ClassVar[str | None] = "rmsnorm"


class RMSNorm(Norm):
    """y = g * x / sqrt(mean(x^2) + eps), computed in float32. Source: arXiv 1910.07467."""

    class Config(Norm.Config):
        type: Literal["rmsnorm"] = "rmsnorm"
        eps: PositiveFloat = 1e-5
        """Added to the mean square, inside the root."""

    def __init__(self, config: Config, dim: int):
        super().__init__()
        self.eps = config.eps
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)

    def param_specs(self) -> dict[str, Spec]:
        return {"weight": Spec("norm", 1, self.dim, 1.0)}


class NoNorm(Norm):
    """y = x."""

    class Config(Norm.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
