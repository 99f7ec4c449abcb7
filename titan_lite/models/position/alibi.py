"""Attention with linear biases."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from titan_lite.models.context import LayerMemory
from titan_lite.models.position.base import Position, ScoreBias
from titan_lite.models.ranks import Ranks


class ALiBi(Position):
    """Scores fall with the distance, in each head at a pace of its own. Source: arXiv 2108.12409.

    score - slope_h * |i - j|, after scaling, for the query at i and the key at j; slope_h = 2^(-8h/H), h from 1. Where
    H is no power of two: the slopes of P heads, the largest power of two below H, then the first, third, ... of 2P.
    """

    class Config(Position.Config):
        type: Literal["alibi"] = "alibi"

    def __init__(self, config: Config, n_heads: int, head_dim: int):
        super().__init__()
        self.key = "alibi"
        self.bias: ALiBiBias = ALiBiBias(n_heads)

    def split(self, ranks: Ranks) -> None:
        super().split(ranks)
        self.bias.split(ranks)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, memory: LayerMemory, prepared: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q, *memory.extend(k, v)


class ALiBiBias(ScoreBias):
    """-slope_h * |i - j|."""

    def __init__(self, n_heads: int):
        self.first, self.n_heads = 0, n_heads
        self.slopes = slopes(n_heads)
        self.key = f"alibi {n_heads}"
        self.power = 2 ** int(math.log2(n_heads))

    def split(self, ranks: Ranks) -> None:
        self.n_heads //= ranks.size
        first = ranks.rank * self.n_heads
        self.first += first
        self.slopes = self.slopes[first : first + self.n_heads]

    def grid(self, q: Tensor, k: Tensor) -> Tensor:
        return self.element(torch.arange(self.n_heads, device=q.device)[:, None, None], q, k)

    def element(self, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Computed, not looked up: no table has to be brought to the device or captured by a compiled kernel.
        head = head + self.first if self.first else head
        regular = 8 * (head + 1)
        exponent = torch.where(head < self.power, regular, regular - 8 * self.power - 4) / self.power
        return -torch.exp2(-exponent) * (q - k).abs()


def slopes(n_heads: int) -> tuple[float, ...]:
    """Those of all heads."""
    power = 2 ** int(math.log2(n_heads))
    regular = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return (*regular, *(2 ** (-4 * (2 * head + 1) / power) for head in range(n_heads - power)))
