"""Rows of a table by number."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from titan_lite.models.module import Module
from titan_lite.models.ranks import Ranks


class Lookup(Module):
    """(tokens (B, T), table (V, width)) -> (B, T, width), as part of the residual stream."""

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        return F.embedding(tokens, table)


class SplitLookup(Lookup):
    """Each rank has some of the rows, one after the other: it looks up those, and the sum over ranks has all."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        number = tokens - self.ranks.rank * table.shape[0]
        elsewhere = (number < 0) | (number >= table.shape[0])
        rows = F.embedding(number.masked_fill(elsewhere, 0), table)
        return self.ranks.reduce(rows.masked_fill(elsewhere[..., None], 0.0), self.training)
