"""Attention as it is written down."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from titan_lite.models.attention.kernel.base import Grids, Kernel, Scoring, n_keys
from titan_lite.models.context import Context
from titan_lite.models.dropout import dropout


class Eager(Kernel):
    """weights(q k^T * scale) v with all scores in memory: computes every choice there is, for any device.

    Matrix products in the dtype of their inputs, everything between them in float32. A group's queries are stacked,
    so that keys and values are not repeated. Source: arXiv 1706.03762, equation 1.
    """

    class Config(Kernel.Config):
        type: Literal["eager"] = "eager"

    def __init__(self, config: Config, scoring: Scoring):
        super().__init__()
        self.scoring = scoring
        self.dropout = dropout(scoring.dropout, "weights")
        self.key = f"eager {scoring.key}"

    def prepare(self, context: Context) -> Grids:
        return self.scoring.grids(context, n_keys(context))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return self._weighted(self._scores(q, k, context), v, context)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, context)
        return self._weighted(scores, v, context), scores.logsumexp(-1)

    def _scores(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """(B, H, T, S) in float32, -inf where a mask says no."""
        grids: Grids = context.prepared[self.key]
        products = stacked(q, k.shape[1]) @ k.transpose(-2, -1)
        scores = products.float().view(*q.shape[:3], -1) * self.scoring.scale  # (B, H, T, S)
        scores = self.scoring.score.capped(scores)
        if grids.bias is not None:
            scores = scores + grids.bias
        return torch.where(grids.allowed, scores, float("-inf"))

    def _weighted(self, scores: Tensor, v: Tensor, context: Context) -> Tensor:
        """The values (B, G, S, Dv) under the weights that the scores (B, H, T, S) give: (B, H, T, Dv)."""
        weights = self.scoring.score.weights(scores, context.prepared[self.key].allowed)
        weights = self.dropout(weights, context.noise).to(v.dtype)
        return (stacked(weights, v.shape[1]) @ v).view(*scores.shape[:3], -1)


def stacked(x: Tensor, groups: int) -> Tensor:
    """(B, H, T, n) -> (B, G, H/G * T, n): one below the other what meets the same keys and values."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)
