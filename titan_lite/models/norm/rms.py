"""Root mean square normalisation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from titan_lite.models.norm.base import GainNorm


class RMSNorm(GainNorm):
    """y = g * x / sqrt(mean(x^2) + eps), computed in float32. Source: arXiv 1910.07467."""

    class Config(GainNorm.Config):
        type: Literal["rmsnorm"] = "rmsnorm"

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), self.gain(self.weight, self.dim), self.eps)
