"""Rotary position embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from titan_lite.config.errors import CROSS_FIELD, Problem
from titan_lite.config.fields import PositiveFloat
from titan_lite.models.context import Context, LayerMemory
from titan_lite.models.position.base import Position


class RoPE(Position):
    """Rotates the pair (j, j + Dh/2) of each query and key by position * theta^(-2j/Dh). Angles in float32.

    Source: arXiv 2104.09864; half-split pairs as in GPT-NeoX and Hugging Face's Llama.
    """

    class Config(Position.Config):
        type: Literal["rope"] = "rope"
        theta: PositiveFloat = 10000.0
        """Base of the frequencies."""

        def head_problems(self, head_dim: int) -> Iterable[Problem]:
            if head_dim % 2:
                why = "rotary positions turn pairs of a head's numbers, so its width must be even"
                yield Problem(CROSS_FIELD, ".head_dim", why, head_dim, "an even number")

    def __init__(self, config: Config, n_heads: int, head_dim: int):
        super().__init__()
        self.theta, self.head_dim = config.theta, head_dim
        self.key = f"rope {head_dim} {config.model_dump_json()}"

    def prepare(self, context: Context) -> tuple[Tensor, Tensor]:
        """cos and sin, each (T, Dh/2)."""
        exponents = (
            torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=context.positions.device) / self.head_dim
        )
        angles = torch.outer(context.positions.to(torch.float32), self.theta**-exponents)
        return angles.cos(), angles.sin()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, memory: LayerMemory, prepared: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = prepared
        return rotate(q, cos, sin), *memory.extend(rotate(k, cos, sin), v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (..., T, Dh) by angles given as cos and sin (T, Dh/2), in float32, back in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
