"""Factors of a branch before it joins the residual stream."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import Module


class BranchScale(Module):
    """(B, T, D) -> (B, T, D)."""

    class Config(SlotConfig):
        slot: ClassVar[str] = "branch_scale"
        default_type: ClassVar[str | None] = "none"

        def pair(self, dim: int) -> tuple[BranchScale, BranchScale]:
            """Those of the attention and the feed-forward branch of one layer."""
            return self.build(dim=dim), self.build(dim=dim)


class NoScale(BranchScale):
    """y = x."""

    class Config(BranchScale.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
