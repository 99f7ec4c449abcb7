"""Normalisation of queries and keys."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from titan_lite.config.component import SlotConfig
from titan_lite.models.module import Module


class QKNorm(Module):
    """q (B, H, T, Dh), k (B, G, T, Dh) -> the same, normalised, before positions act on them.

    A norm commutes with a rotation, a gain does not. A gain that belongs behind the rotation is applied by
    `after_position` to the queries alone, those of the keys included: scores are the same, and cached keys need no
    second look.
    """

    class Config(SlotConfig):
        slot: ClassVar[str] = "qk_norm"
        default_type: ClassVar[str | None] = "none"

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def after_position(self, q: Tensor) -> Tensor:
        """q (B, H, T, Dh) with the gains that act behind the position encoding."""
        return q


class NoQKNorm(QKNorm):
    """Queries and keys as projected."""

    class Config(QKNorm.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k
