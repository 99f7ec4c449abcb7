"""The normalised residual of nGPT."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.fields import PositiveFloat
from titan_lite.models.context import Context
from titan_lite.models.learned_scale import LearnedScale
from titan_lite.models.norm import L2Norm, Norm
from titan_lite.models.residual.base import Branch, Residual
from titan_lite.models.residual.branch_scale import BranchScale
from titan_lite.parallel.plan import SEQ, Plan


class NGPTResidual(Residual):
    """x' = N(x + |a| * (N(branch(x)) - x)): a step a (D,) along the sphere; N(x) = x / |x|.

    a is learned, one per branch, and moves by alpha_init * sqrt(D) * lr. The paper has a, its code |a|.
    Source: arXiv 2410.01131, section 2.2.
    """

    class Config(Residual.Config):
        type: Literal["ngpt"] = "ngpt"
        normalises_stream: ClassVar[bool] = True
        alpha_init: PositiveFloat = 0.05
        """First value of a, of the order of 1 / n_layers."""

    def __init__(self, config: Config, dim: int, norm: Norm.Config, n_layers: int, scale: BranchScale, place: str):
        super().__init__(config, dim, norm, n_layers, scale, place)
        self.norm = L2Norm.Config().build(dim=dim)
        self.alpha = LearnedScale(dim, config.alpha_init, dim**-0.5)

    def tp_plan(self) -> Plan:
        return {"alpha": SEQ}

    def forward(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        target = self.norm(branch(x, context))
        return self.norm(x.lerp(target, self.alpha().abs().type_as(x)))
