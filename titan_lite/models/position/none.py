"""No position encoding: a causal mask alone tells order. Source: arXiv 2305.19466."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from titan_lite.models.context import LayerMemory
from titan_lite.models.position.base import Position


class NoPosition(Position):
    """Queries and keys as they are. Source: arXiv 2305.19466 (NoPE)."""

    class Config(Position.Config):
        type: Literal["none"] = "none"

    def __init__(self, config: Config, n_heads: int, head_dim: int):
        super().__init__()
        self.key = "none"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, memory: LayerMemory, prepared: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q, *memory.extend(k, v)
