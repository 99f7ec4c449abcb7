"""Where the norms of a branch stand."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from titan_lite.models.context import Context
from titan_lite.models.norm import Norm
from titan_lite.models.residual.base import AdditiveResidual, Branch, Residual
from titan_lite.models.residual.scale import BranchScale


class PreNorm(AdditiveResidual):
    """x' = x + branch(norm(x)). Source: arXiv 2002.04745."""

    class Config(Residual.Config):
        type: Literal["pre"] = "pre"

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__(config, dim, norm, n_layers, scale, place)
        self.norm = norm.build(dim=dim)

    def delta(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return self.scaled(branch(self.norm(x), context), context)
