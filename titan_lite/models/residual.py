"""How a branch joins the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.context import Context
from titan_lite.models.module import Module
from titan_lite.models.norm import Norm

Branch = Callable[[Tensor, Context], Tensor]


class Residual(Module):
    """(x, branch, context) -> x', all (B, T, D)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "residual"
        default_type: ClassVar[str | None] = "pre"


class PreNorm(Residual):
    """x' = x + branch(norm(x)). Source: arXiv 2002.04745."""

    class Config(Residual.Config):
        type: Literal["pre"] = "pre"

    def __init__(self, config: Config, dim: int, norm: Norm.Config):
        super().__init__()
        self.norm = norm.build(dim=dim)

    def forward(self, x: Tensor, branch: Branch, context: Context) -> Tensor:
        return x + branch(self.norm(x), context)
