"""Unit vectors."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from titan_lite.config.fields import PositiveFloat
from titan_lite.models.norm.base import Norm


class L2Norm(Norm):
    """y = x / max(|x|, eps) with the Euclidean length |x|, computed in float32. Source: arXiv 2410.01131, section 2."""

    class Config(Norm.Config):
        type: Literal["l2"] = "l2"
        eps: PositiveFloat = 1e-12
        """The least length to divide by."""

    def __init__(self, config: Config, dim: int):
        super().__init__()
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1, eps=self.eps).type_as(x)
